"""The slides' exhibits beyond the table of accuracies, one room each: `python -m studies.<name>`, or `dvc repro <name>`.

A room holds the study's numbers (schema), what it computes, its figure and its page (a template).
"""

from stages import guard  # first of all: it takes the digests of the code that is loaded after it

__all__ = ["guard"]
