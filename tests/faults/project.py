"""A tiny project as it is before and after each stage."""

import copy
import functools
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # torch's optimisers import it, for seconds, when the first one is made
from ruamel.yaml import YAML

from stages import cells, compare, evaluate, fetch, leaderboard, meta_train, preprocess, split
from studies import page
from studies.leap_comparison import __main__ as leap_comparison
from tests.conftest import ROOT, change, copy_project, shrink
from tests.faults.process import Ended, Process

CODE = ("metalib", "stages", "studies", "tests")
STAGES: dict[str, Callable[..., object]] = {
    "fetch": functools.partial(fetch.app, []),
    "preprocess": functools.partial(preprocess.app, []),
    "cells": functools.partial(cells.app, []),
    "split": functools.partial(split.app, ["5w1s"]),
    "meta_train": functools.partial(meta_train.app, ["maml", "5w1s"]),
    "evaluate": functools.partial(evaluate.app, ["maml", "5w1s"]),
    "compare": functools.partial(compare.app, ["5w1s"]),
    "leaderboard": functools.partial(leaderboard.app, []),
    "leap_comparison": functools.partial(leap_comparison.app, []),
    "page": functools.partial(page.app, ["leap_comparison"]),
}
RIVAL = {  # another learner, so that there is something to compare
    "meta_train": functools.partial(meta_train.app, ["fomaml", "5w1s"]),
    "evaluate": functools.partial(evaluate.app, ["fomaml", "5w1s"]),
}
TINY = {
    "settings": ["5w1s"],
    "data.glyphs": {"background": 2, "evaluation": 1, "characters": 5, "seed": 0},
    "split.validation": 5,
    "split.test": 5,
    "budgets.quick.counts.common.test_tasks": 3,
    "budgets.quick.counts.common.validation_tasks": 2,
    "algorithms.maml.quick.s5w1s.outer": {"meta_steps": 4, "meta_batch": 1, "validations": 4},
    "algorithms.maml.quick.common.test.inner_steps": 1,
    "studies.protocols.common.learners": ["maml"],
} | {
    f"studies.leap_comparison.quick.{key}": value for key, value in dict(
        seeds=[3], alphabets=[1], test_alphabets=2, way=3, filters=4, inner_batch=4, inner_steps=2, maml_steps=1,
        meta_steps=2, meta_batch=1, measure_every=1, window=2,
    ).items()
}  # fmt: skip
OTHER = {"data.glyphs.seed": 1, "meta_train.seed": 5, "studies.leap_comparison.quick.seeds": [4]}
Tree = dict[str, bytes]  # path -> content


class Project:
    """A folder in which one stage after the other is tried."""

    def __init__(self, root: Path):
        self.folder = root / "project"
        self.seconds = dict[str, float]()  # that a stage takes
        self.old, self.new = self._whole(OTHER), self._whole({})

    def _whole(self, values: dict[str, Any]) -> Tree:
        """All files after an uninterrupted run of all stages."""
        shutil.rmtree(self.folder, ignore_errors=True)
        make(self.folder, values)
        for name, work in STAGES.items():
            began = time.monotonic()
            self.run(work)
            self.seconds[name] = time.monotonic() - began
            if name in RIVAL:
                self.run(RIVAL[name])
        return tree(self.folder)

    def copy(self, number: int) -> "Project":
        """For trials beside those in this one."""
        made = copy.copy(self)
        made.folder = self.folder.with_name(f"project{number}")
        shutil.copytree(self.folder, made.folder, dirs_exist_ok=True)
        return made

    def run(self, work: Callable[[], object]) -> Ended:
        """Without any fault."""
        ended = Process(work, self.folder).end()
        assert ended.status == 0, f"failed: {ended.said}"
        return ended

    def prepare(self, stage: str, stale: bool) -> None:
        """The folder as it is before a stage; `stale`: with what this stage and those after it made of other params."""
        for path in self.folder.iterdir():
            if path.name not in CODE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, content in self._before(stage, stale).items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)

    def resume(self, stage: str, stale: bool) -> None:
        """AssertionError unless everything in the folder is whole, and as if nothing had been when the stage has run again."""
        before, found = self._before(stage, stale), tree(self.folder)
        for output in outputs(stage):
            states = [{}, part(before, output), part(self.new, output)]
            assert part(found, output) in states, f"half-written: {output}"
        checkpoints = self.checkpoints()
        ended = self.run(STAGES[stage])
        assert not checkpoints or "goes on" in ended.said, f"started afresh beside {checkpoints}"
        expected = {name: content for name, content in before.items() if not belongs(name, outputs(stage))}
        for output in outputs(stage):
            expected |= part(self.new, output)
        found = tree(self.folder)
        assert found.keys() == expected.keys(), f"left over or lost: {sorted(found.keys() ^ expected.keys())}"
        assert not (other := [name for name in found if found[name] != expected[name]]), f"another content: {other}"

    def checkpoints(self) -> list[str]:
        return [path.name for path in (self.folder / ".checkpoints").rglob("*.pt") if not path.parent.name.endswith(".part")]

    def model(self) -> Tree:
        return part(tree(self.folder), "models/5w1s/maml")

    def _before(self, stage: str, stale: bool) -> Tree:
        names = list(STAGES)
        later = [output for name in names[names.index(stage) :] for output in outputs(name)]
        kept = {name: content for name, content in self.new.items() if not belongs(name, later)}
        return kept | ({name: content for name, content in self.old.items() if belongs(name, later)} if stale else {})


def make(folder: Path, values: dict[str, Any]) -> None:
    """The project's code with a pipeline of only these stages, since it takes a second to read the whole one."""
    copy_project(folder)
    params, pipeline = folder / "params.yaml", folder / "dvc.yaml"
    shrink(params)
    sections = YAML(typ="safe").load(params)
    kept = ("maml", "fomaml", "leap_comparison", "protocols")  # the stage `cells` reads the last one
    others = [f"{part}.{name}" for part in ("algorithms", "studies") for name in sections[part] if name not in kept]
    change(params, TINY | values | dict.fromkeys(others))
    sections = YAML(typ="safe").load(pipeline)
    others = [f"stages.{name}" for name in sections["stages"] if name not in STAGES]
    change(pipeline, dict.fromkeys([*others, *(name for name in sections if name != "stages")]))


def tree(folder: Path) -> Tree:
    """Every file but the code."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path): content(folder / path) for path in found if path.parts[0] not in CODE}


def content(path: Path) -> bytes:
    """But for the time that a study took."""
    return re.sub(rb'"seconds": \d+', b'"seconds": 0', path.read_bytes())


@functools.cache
def outputs(stage: str) -> list[str]:
    """A stage's files and folders in dvc.yaml, those of maml in 5w1s."""
    section = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"][stage]
    found = [output for kind in ("outs", "metrics", "plots") for output in section.get(kind, [])]
    names = [output if isinstance(output, str) else next(iter(output)) for output in found]
    for key, value in {"setting": "5w1s", "algorithm": "maml", "study": "leap_comparison"}.items():
        names = [name.replace(f"${{item.{key}}}", value) for name in names]
    return names


def belongs(name: str, outputs: list[str]) -> bool:
    return any(name == output or name.startswith(output + "/") for output in outputs)


def part(whole: Tree, output: str) -> Tree:
    return {name: content for name, content in whole.items() if belongs(name, [output])}
