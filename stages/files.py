"""Where the pipeline's files are, and how they are written (whole or not at all) and read."""

import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metalib.data.omniglot import Characters
from metalib.data.tasks import Tasks

RAW = Path("data/raw")
CHARACTERS = Path("data/characters.npz")


def tasks_file(setting: str) -> Path:
    return Path(f"data/tasks/{setting}.npz")


def model_folder(setting: str, algorithm: str) -> Path:
    return Path(f"models/{setting}/{algorithm}")


def results_file(setting: str, algorithm: str) -> Path:
    return Path(f"results/{setting}/{algorithm}.npz")


def metrics_file(setting: str, algorithm: str) -> Path:
    return Path(f"metrics/{setting}/{algorithm}.json")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which replaces `path` if all went well, else vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    _remove(beside)
    try:
        yield beside
        if path.is_dir():
            _remove(path)
        os.replace(beside, path)
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_arrays(path: Path, **arrays: Any) -> None:
    """A .npz whose bytes depend on the arrays alone."""
    with whole(path) as beside, open(beside, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():  # np.savez's own zip headers depend on the Python version
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asanyarray(array), allow_pickle=False)
            archive.writestr(member, content.getvalue())


def load_characters() -> Characters:
    with load_arrays(CHARACTERS, "preprocess") as arrays:
        values = {name: arrays[name] for name in Characters._fields}
        return Characters(**values | {name: str(arrays[name]) for name in ("source", "drawn")})


class TaskFile(NamedTuple):
    """What the split stage leaves for a setting."""

    train: torch.Tensor  # (N,) indices of the meta-training characters
    validation: Tasks
    test: Tasks
    protocol: dict[str, Any]  # data, split, rotations, way, shot, query: what every result of it must show


def load_tasks(setting: str) -> TaskFile:
    with load_arrays(tasks_file(setting), f"split@{setting}") as arrays:
        validation, test = (
            Tasks(*(torch.from_numpy(arrays[f"{part}_{name}"].astype(np.int64)) for name in Tasks._fields))
            for part in ("validation", "test")
        )
        protocol = {name.removeprefix("protocol_"): arrays[name].item() for name in arrays if name.startswith("protocol_")}
        return TaskFile(torch.from_numpy(arrays["train"]), validation, test, protocol)


def first(tasks: Tasks, count: int, what: str) -> Tasks:
    """The first `count` tasks; ValueError when there are fewer."""
    if count > len(tasks.classes):
        raise ValueError(
            f"{what}: {count} tasks asked for, but only {len(tasks.classes)} are stored; raise tasks in params.yaml"
        )
    return Tasks(*(index[:count] for index in tasks))


@contextmanager
def load_arrays(path: Path, stage: str) -> Iterator[Any]:
    """The arrays of a .npz that `stage` makes; ValueError when it is missing, damaged, or of another version."""
    try:
        with np.load(path) as arrays:
            yield arrays
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); make it with: dvc repro {stage}") from None
