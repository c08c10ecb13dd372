"""What a trained model is of, as its meta.json says, and whether that fits what it is to be tested on."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from metalib.models.loss import engine
from stages import files, guard, params
from stages.command import device_name


def provenance(cell: params.Cell, device: torch.device) -> dict[str, Any]:
    """Values, data, code, libraries and machine of the training that is running; no times: the same gives the same bytes."""
    code = {name: digest for name, digest in guard.began().items() if not name.startswith("data/")}
    return {
        **_values(cell),
        "sha256": _data(cell.setting) | {"code": hashlib.sha256(json.dumps(sorted(code.items())).encode()).hexdigest()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "torch")},
        "device": f"{device.type} ({device_name(device)})",
        "threads": torch.get_num_threads(),
        "engine": engine(params.make_network(cell, way=2, image_size=28), device),
    }


def refuse_misfit(meta: Mapping[str, Any], cell: params.Cell) -> None:
    """ValueError where a model was trained with other values or on other data than its cell's, which the stage declares."""
    model = files.model_folder(cell.setting, cell.algorithm)
    remedy = f"train it again with: dvc repro meta_train@{cell.algorithm}-{cell.setting}"
    values, data = _values(cell), _data(cell.setting)
    try:
        trained = dict(guard.leaves({key: meta[key] for key in values} | {"seeds": [one["seed"] for one in meta["seeds"]]}))
        trained_on = {name: meta["sha256"][name] for name in data}
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{model} does not say what it was trained with ({error!r}); {remedy}") from None
    asked = dict(guard.leaves(values | {"seeds": cell.seeds}))
    for name in (*trained, *asked):
        if trained.get(name) != asked.get(name):
            was, now = trained.get(name, "nothing"), asked.get(name, "nothing")
            what = f"{name[:80]} {was[:80]}"  # a damaged file may say anything
            raise ValueError(f"{model} was trained with {what}, but {files.CELLS} now has {now}; {remedy}")
    for name, digest in data.items():
        if trained_on[name] != digest:
            raise ValueError(f"{model} was trained on other {name} than those now in data; {remedy}")


def _values(cell: params.Cell) -> dict[str, Any]:
    """What determines a training, but for the seeds, which meta.json has with what became of each."""
    return cell.model_dump(mode="json", exclude={"seeds", "own"})


def _data(setting: str) -> dict[str, str]:
    """Digests of what the running stage, which declares both, has read."""
    began = guard.began()
    return {"characters": began[str(files.CHARACTERS)], "tasks": began[str(files.tasks_file(setting))]}
