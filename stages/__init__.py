"""The pipeline's stages, one command each: `python -m stages.<name> --help`. dvc.yaml says how they hang together."""

from stages import guard  # first of all: it takes the digests of the code that is loaded after it

__all__ = ["guard"]
