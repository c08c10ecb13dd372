"""Where the pipeline's files are, and how they are written (whole or not at all) and read."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import reprlib
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt, ValidationError
from safetensors import SafetensorError
from typing_extensions import TypedDict

from metalib.complaints import checked, describe
from metalib.data.omniglot import DRAWERS, Characters
from metalib.data.tasks import Protocol, Tasks
from metalib.files import sweep
from metalib.files import whole as written
from stages import guard
from stages.params import Cell

RAW = Path("data/raw")
CHARACTERS = Path("data/characters.npz")
CELLS = Path("data/cells")
LARGEST = 1 << 31  # bytes of an array; all of Omniglot in its original size has a sixth of them


def tasks_file(setting: str) -> Path:
    return Path(f"data/tasks/{setting}.npz")


def checkpoint(name: str) -> Path:
    """Where a training keeps its state; experiments, which run in folders of their own, share one place.

    What killed processes left there is removed: a training that is taken up after its last validation writes no other.
    """
    path = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints" / f"{name}.pt"
    sweep(path.parent)
    return path


def fingerprint(facts: Any, *paths: Path) -> str:
    """Of values and of the files at `paths`, in folders the code: a training's checkpoint is another's when one changes."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for path in paths:
        code = (file for file in path.rglob("*") if file.suffix in (".py", ".cpp") and "/." not in str(file.relative_to(path)))
        for file in sorted(code) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def model_folder(setting: str, algorithm: str) -> Path:
    return Path(f"models/{setting}/{algorithm}")


def results_file(setting: str, algorithm: str) -> Path:
    return Path(f"results/{setting}/{algorithm}.npz")


def metrics_file(setting: str, algorithm: str) -> Path:
    return Path(f"metrics/{setting}/{algorithm}.json")


def run_file(setting: str, algorithm: str) -> Path:
    """The metrics' provenance: data, protocol, training."""
    return Path(f"metrics/{setting}/{algorithm}.run.json")


def plots_folder(setting: str, algorithm: str) -> Path:
    return Path(f"plots/{setting}/{algorithm}")


def study_file(name: str) -> Path:
    """What a study has found, before it becomes a page."""
    return Path(f"results/studies/{name}.json")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """As metalib.files.whole; and ValueError, and nothing replaced, where an input of the stage has changed since it began.

    OSError, and nothing replaced, where DVC's cache cannot take a copy: DVC itself would print a warning, end as if all were
    well, and forget the training.
    """
    with placed(path), written(path) as beside:
        yield beside
        guard.check()
        _cacheable(beside)


def _cacheable(made: Path) -> None:
    """OSError where the cache of the DVC that runs this stage, if one does, lacks the room or the right for `made`."""
    if "DVC_ROOT" not in os.environ:
        return
    home = Path(os.environ["DVC_ROOT"], ".dvc")
    cache = home / "cache"
    with suppress(ImportError):  # DVC may be installed in a place of its own
        from dvc.config import Config  # here: most runs of this module are not DVC's

        cache = Path(Config(dvc_dir=str(home))["cache"].get("dir", cache))
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    if shutil.disk_usage(place).free < sum(file.stat().st_size for file in (made, *made.rglob("*")) if file.is_file()):
        raise OSError(errno.ENOSPC, "", str(cache))
    if not os.access(place, os.W_OK):
        raise OSError(errno.EACCES, "", str(cache))


@contextmanager
def placed(path: Path) -> Iterator[None]:
    """A system's error in this block that names no place, as that of a full disk does, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    with whole(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """At least one row; the first one's keys are the header. Floats have six digits."""
    with whole(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


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
        images = values["images"]
        if (
            images.dtype != np.uint8
            or images.shape[1:] != (DRAWERS, *images.shape[-1:] * 2)
            or any(values[name].shape != images.shape[:1] for name in ("alphabets", "characters", "background"))
        ):
            raise ValueError(f"arrays of {images.dtype}, {images.shape}, are no characters")
        return Characters(**values | {name: str(arrays[name]) for name in ("source", "drawn")})


class TaskFile(NamedTuple):
    """What the split stage leaves for a setting."""

    train: torch.Tensor  # (N,) indices of the meta-training characters
    validation: Tasks
    test: Tasks
    protocol: Protocol


def load_tasks(setting: str) -> TaskFile:
    with load_arrays(tasks_file(setting), f"split@{setting}") as arrays:
        validation, test = (_tasks(part, arrays) for part in ("validation", "test"))
        protocol = Protocol(**{name: arrays[f"protocol_{name}"].item() for name in Protocol._fields})
        return TaskFile(torch.from_numpy(arrays["train"]), validation, test, protocol)


def _tasks(part: str, arrays: Any) -> Tasks:
    """The validation or the test tasks; ValueError for one that is of other characters, drawers or turns than there are."""
    tasks = [arrays[f"{part}_{name}"] for name in Tasks._fields]
    known = (arrays[part], range(DRAWERS), range(4))
    for name, index, allowed in zip(Tasks._fields, tasks, known, strict=True):
        if index.dtype.kind not in "iu" or index.shape[:2] != tasks[0].shape or not np.isin(index, list(allowed)).all():
            raise ValueError(f"{part}_{name} are not those of tasks")
    return Tasks(*(torch.from_numpy(index.astype(np.int64)) for index in tasks))


def load_cell(setting: str, algorithm: str) -> Cell:
    """The values that a cell is trained with, as the stage `cells` resolved them; ValueError for a cell there is none of."""
    known = sorted(path.stem for path in (CELLS / setting).glob("*.json"))
    if known and algorithm not in known:
        raise ValueError(f"algorithm: {algorithm!r} has no cell in {setting}; there are {', '.join(known)}")
    return _cell(load_json(CELLS / setting / f"{algorithm}.json", "cells"))


def load_protocol_cells() -> dict[str, Cell]:
    """The same for each learner of the study `protocols`."""
    return {name: _cell(values) for name, values in load_json(CELLS / "protocols.json", "cells").items()}


def load_test_count(setting: str) -> int:
    """How many of the setting's tasks a model is tested on."""
    path = CELLS / f"{setting}.json"
    values = load_json(path, "cells")
    with readable(path, "cells"):
        return checked(Count, values, setting)["test_tasks"]


class Count(TypedDict):
    test_tasks: PositiveInt


def _cell(values: Any) -> Cell:
    try:
        return Cell.model_validate(values)
    except ValidationError as error:
        raise ValueError(
            f"a file of {CELLS} was written by another version of the code ({describe(error, 'cell')}); run: dvc repro cells"
        ) from None


@contextmanager
def readable(path: Path, stage: str) -> Iterator[None]:
    """ValueError names the file, and the stage that makes it, where it is found missing, damaged or of another version."""
    try:
        yield
    except (
        OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError,
        csv.Error, zipfile.BadZipFile, zlib.error, SafetensorError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]  # zipfile quotes whole names
        raise ValueError(f"{path} cannot be read ({reason}); make it with: dvc repro {stage}") from None


def load_json(path: Path, stage: str) -> dict[str, Any]:
    """The mapping in a JSON file that `stage` makes, each of whose keys is there once."""
    with readable(path, stage):
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        if not isinstance(found, dict):
            raise ValueError(f"{reprlib.repr(found)} is no mapping")
        return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{reprlib.repr(key)} is there twice")
    return found


@contextmanager
def load_arrays(path: Path, stage: str) -> Iterator[Any]:
    """The arrays of a .npz that `stage` makes."""
    with readable(path, stage):
        _require_room(path)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        with np.load(path) as arrays:
            yield arrays


def _require_room(path: Path) -> None:
    """ValueError for an array whose header promises other bytes than follow it, or more than LARGEST: they are allocated."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                try:
                    shape, _, dtype = header[np.lib.format.read_magic(file)](file)
                except Exception as error:  # it is parsed as Python's literals, whose complaints are of many kinds
                    raise ValueError(f"{member.filename}: {error}") from None
                promised = math.prod(shape) * dtype.itemsize
                if dtype.hasobject or promised > LARGEST or file.tell() + promised != member.file_size:
                    raise ValueError(f"{member.filename}: {shape} of {dtype} in {member.file_size} bytes")
