"""Turn the two archives into one array of small images."""

import json

import typer

from metalib.data import omniglot
from stages import files, params
from stages.command import console, one_sentence
from stages.guard import guarded

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded("preprocess")
def main() -> None:
    """Write data/characters.npz: images uint8 (characters, 20, size, size), ink 255, with the characters' names.

    The content of the archives is checked again, so a damaged file in the DVC cache does not pass.
    """
    data = params.read().data
    digests = omniglot.DIGESTS
    if data.source == "glyphs":  # the program that drew them says what they are
        try:
            written = json.loads((files.RAW / "digests.json").read_text())
            digests = {name: str(written[name]) for name in omniglot.ARCHIVES}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{files.RAW} holds no glyphs ({error}); make them with: dvc repro fetch") from None
    background, evaluation = (files.RAW / f"{name}.zip" for name in omniglot.ARCHIVES)
    characters = omniglot.read((background, evaluation), digests, data.source, data.image_size, data.resize)
    files.save_arrays(files.CHARACTERS, **characters._asdict())
    alphabets = len(set(zip(characters.background.tolist(), characters.alphabets.tolist(), strict=True)))
    console.print(f"{files.CHARACTERS}: {len(characters.alphabets)} characters of {alphabets} alphabets, {data.source}")


if __name__ == "__main__":
    app()
