"""The slides' exhibits beyond the table of accuracies, one room each: `dvc repro page@<name>`.

A room holds the study's numbers (schema), what it computes (`python -m studies.<name>`), and its figure and page, a template
(`python -m studies.page <name>`).
"""

from stages import guard  # first of all: it takes the digests of the code that is loaded after it

__all__ = ["guard"]
