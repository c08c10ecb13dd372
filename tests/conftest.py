"""A small project of its own for tests of the stages."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from typer import Typer
from typer.testing import CliRunner

from stages import cells, fetch, preprocess, split

ROOT = Path(__file__).parents[1]
Edit = Callable[..., None]
Stage = Callable[..., str]

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and in processes that tests start, whose models say how many there were

read = YAML.load
known = dict[str | bytes, Any]()


def load(self: YAML, stream: Any) -> Any:
    """The same text is parsed once: reading dvc.yaml takes longer than what most stages do at tiny size."""
    text = stream.read_bytes() if isinstance(stream, Path) else stream
    if self.typ != ["safe"] or not isinstance(text, str | bytes):
        return read(self, stream)
    if text not in known:
        known[text] = read(self, stream)
    return copy.deepcopy(known[text])


YAML.load = load

TINY = {
    "data.source": "glyphs",
    "data.image_size": 16,
    "data.glyphs": {"background": 4, "evaluation": 3, "characters": 5, "seed": 0},
    "split.validation": 6,
    "split.test": 8,
    "tasks.validation": 5,
    "tasks.test": 7,
    "budgets.quick.counts.common": {"validations": 2, "validation_tasks": 4, "test_tasks": 6},
    "budgets.quick.counts.s5w1s": None,
    "budgets.quick.network.filters": 4,
    "budgets.quick.seeds": 2,
}


def change(file: Path, values: dict[str, Any]) -> None:
    """Set dotted keys of a YAML file; None removes the key."""
    content = YAML(typ="safe").load(file)
    for path, value in values.items():
        *parents, last = path.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    if values:
        YAML().dump(content, file)


def shrink(file: Path) -> None:
    """Make a params.yaml tiny: glyphs, a few tasks, a few meta-steps of a thin network, for every algorithm there is."""
    values = dict(TINY)
    for name, section in YAML(typ="safe").load(file)["algorithms"].items():
        steps = min(4, section["quick"]["common"]["outer"]["meta_steps"])
        own = {"outer": {"meta_steps": steps, "meta_batch": 2, "validations": 2}}
        values[f"algorithms.{name}.quick.s5w1s"] = own
    change(file, values)


def copy_project(folder: Path) -> None:
    """The project's code and pipeline, without data and results, for tests that run DVC or add to the code."""
    names = ("metalib", "stages", "studies", "tests", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml")
    for name in (*names, "params.yaml", "pyproject.toml"):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dvc.yaml, a tiny params.yaml, and the data that its stages make before any training."""
    folder = tmp_path_factory.mktemp("ready")
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / file, folder)
    shrink(folder / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, *arguments in ((fetch,), (preprocess,), (cells,), (split, "5w1s"), (split, "5w5s")):
            outcome = CliRunner().invoke(module.app, arguments)
            assert outcome.exit_code == 0, outcome.output
    return folder


@pytest.fixture
def edit(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """A folder with a tiny params.yaml to work in; call it to change the file."""
    file = tmp_path / "params.yaml"
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ready / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMNIGLOT_MIRROR", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("METALIB_DEVICE", "cpu")
    return lambda **values: change(file, {key.replace("__", "."): value for key, value in values.items()})


@pytest.fixture
def data(edit: Edit, ready: Path) -> None:
    """And what fetch, preprocess, cells and split make there, of both 5-way settings; edited values of theirs come too late."""
    shutil.copytree(ready / "data", "data")


@pytest.fixture
def stage() -> Stage:
    """Run a stage's command; returns its output, which is the sentence when it is expected to fail (with this status)."""

    def run(app: Typer, *arguments: str, fails: int = 0) -> str:
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == int(fails), outcome.output
        return " ".join(outcome.output.split())

    return run
