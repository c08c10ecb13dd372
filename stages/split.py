"""Divide the characters, and draw a setting's evaluation tasks once for all algorithms."""

from typing import Annotated, Any

import numpy as np
import torch
import typer

from metalib.data import splits, tasks
from metalib.data.omniglot import DRAWERS
from metalib.randomness import generator
from stages import files, params
from stages.command import console, one_sentence
from stages.guard import guarded

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded("split")
def main(setting: Annotated[str, typer.Argument(help="for instance 5w1s")]) -> None:
    """Write data/tasks/<setting>.npz: the split's characters, and the validation and test tasks as indices.

    A task is (way) characters, for each the drawers of its support and query images, and its rotation.
    """
    file = params.read()
    shape = params.setting(file, setting)
    characters = files.load_characters()
    classes = splits.divide(characters, file.split)
    arrays: dict[str, Any] = {}
    for part, count in (("validation", file.tasks.validation), ("test", file.tasks.test)):
        try:
            drawn = tasks.draw(
                count,
                torch.from_numpy(getattr(classes, part)),
                way=shape.way,
                images=shape.shot + shape.query,
                drawers=DRAWERS,
                rotations=file.tasks.rotations,
                generators=[generator(file.tasks.seed, part, setting)],
            )
        except ValueError as error:
            raise ValueError(f"setting {setting}, {part} characters of split.scheme {file.split.scheme}: {error}") from None
        for name, index in drawn._asdict().items():
            arrays[f"{part}_{name}"] = index.numpy().astype(np.int16)  # at most 1,623 characters
    protocol = tasks.Protocol(
        characters.source, characters.drawn, file.split.scheme, file.tasks.rotations, shape.way, shape.shot, shape.query
    )
    kept = {f"protocol_{name}": value for name, value in protocol._asdict().items()}
    files.save_arrays(files.tasks_file(setting), **classes._asdict(), **arrays, **kept)
    sizes = " / ".join(str(len(part)) for part in classes)
    console.print(f"{files.tasks_file(setting)}: {sizes} characters to train, validate, test ({file.split.scheme})")


if __name__ == "__main__":
    app()
