"""The pipeline's stages, one command each: `python -m stages.<name> --help`. dvc.yaml says how they hang together."""
