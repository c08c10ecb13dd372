"""The stages one after the other on glyphs, through typer's runner; and once through DVC itself."""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress as Bar
from typer.testing import CliRunner

import metalib
from metalib import algorithms
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from metalib.types import TaskLoss
from stages import cells, command, compare, evaluate, fetch, files, leaderboard, meta_train, params, preprocess, split
from tests.conftest import ROOT, Edit, Stage, change, copy_project, shrink

names = algorithms.names()
PLACES = ("data", "models", "metrics", "plots", "results", "reports")
STAGES = {
    "fetch": fetch, "preprocess": preprocess, "cells": cells, "split": split, "meta_train": meta_train, "evaluate": evaluate,
    "compare": compare, "leaderboard": leaderboard,
}  # fmt: skip


def test_the_whole_road(edit: Edit, stage: Stage, tmp_path: Path) -> None:
    """Every learner from fetch to leaderboard; another process, with another order of sets, leaves the same bytes elsewhere.

    Seen failing where learners of equal accuracy stood in the leaderboard in the order of a set.
    """
    edit()
    for module, *arguments in ((fetch,), (preprocess,), (cells,), (split, "5w1s")):
        stage(module.app, *arguments)
    with np.load("data/tasks/5w1s.npz") as stored:
        assert stored["test_classes"].shape == (7, 5) and stored["validation_images"].shape == (5, 5, 2)
        assert set(stored["test_classes"].flatten()) <= set(stored["test"])
        assert set(stored["validation_classes"].flatten()) <= set(stored["validation"])
        assert not set(stored["train"]) & (set(stored["test"]) | set(stored["validation"]))
    for name in names:
        said = stage(meta_train.app, name, "5w1s")
        steps = 0 if name == "scratch" else 4
        assert f"{name} 5w1s: meta-step {steps} of {steps}" in said and ("query loss" in said) == (steps > 0)
        assert f"meta_steps={steps}*" in said and f"* from algorithms.{name}.quick.s5w1s" in said
        stage(evaluate.app, name, "5w1s")
        metrics = json.loads(Path(f"metrics/5w1s/{name}.json").read_text())
        run = json.loads(Path(f"metrics/5w1s/{name}.run.json").read_text())
        assert (run["data"], run["split"], run["budget"]) == ("glyphs", "characters", "quick")
        assert (run["seeds"], run["tasks"], run["query"], run["meta_steps"]) == (2, 6, 1, steps)
        with np.load(f"results/5w1s/{name}.npz") as results:
            assert results["transductive"].shape[0] == 2 and results["transductive"].shape[2] == 6
            assert metrics["accuracy"] == pytest.approx(100 * results["transductive"][:, -1].mean(), abs=0.006)
            assert metrics["inductive"] == pytest.approx(100 * results["inductive"][:, -1].mean(), abs=0.006)
            by_step = rows(f"plots/5w1s/{name}/by_step.csv")
            assert len(by_step) == results["transductive"].shape[1]
            assert float(by_step[-1]["transductive"]) == metrics["accuracy"]
        curve = rows(f"plots/5w1s/{name}/learning_curve.csv")
        assert [row["step"] for row in curve] == ([str(steps)] if steps == 0 else ["2", "4"])
        assert all(row["validation"] for row in curve)
    stage(compare.app, "5w1s")
    report = Path("reports/5w1s.md").read_text()
    assert "glyphs" in report and "budget quick" in report and "| 4 x 2 |" in report
    assert all(f"| {name} |" in report for name in names)
    assert Path("reports/5w1s.png").stat().st_size > 10_000
    stage(leaderboard.app)
    board = Path("reports/leaderboard.md").read_text()
    assert "5-way 1-shot: data glyphs" in board and "98.7 ± 0.4" in board  # the slides' number beside ours
    assert not list(Path(".").rglob("*.part")) and not list(Path(".checkpoints").iterdir())
    found = contents(Path("."))
    assert len(found) > 9 * len(names)
    again = tmp_path / "again"
    again.mkdir()
    for file in ("params.yaml", "dvc.yaml"):
        shutil.copy(file, again)
    afresh = [sys.executable, "-c", "from tests import test_stages; test_stages.road()"]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    subprocess.run(afresh, cwd=again, env=surroundings, check=True, capture_output=True)
    assert contents(again) == found


def road() -> None:
    """All stages of one setting, in the working folder."""
    cells_of = [(module, name, "5w1s") for name in names for module in (meta_train, evaluate)]
    steps = [(fetch,), (preprocess,), (cells,), (split, "5w1s"), *cells_of, (compare, "5w1s"), (leaderboard,)]
    for module, *arguments in steps:
        assert not module.app(arguments, standalone_mode=False)


def contents(folder: Path) -> dict[Path, bytes]:
    """All that the stages have written there."""
    paths = [path for place in PLACES for path in (folder / place).rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_inductive_training(data: None, edit: Edit, stage: Stage) -> None:
    edit(meta_train__statistics="inductive", meta_train__rotations="tasks")
    stage(cells.app)
    stage(meta_train.app, "maml", "5w1s")
    stage(evaluate.app, "maml", "5w1s")
    run = json.loads(Path("metrics/5w1s/maml.run.json").read_text())
    assert (run["train_statistics"], run["train_rotations"]) == ("inductive", "tasks")


def until(event: Callable[[], object]) -> Callable[..., meta_train.Steps]:
    """In place of `meta_train.train`: the same to its first validation, then what `event` does."""
    honest = meta_train.train

    def train(*arguments: object) -> meta_train.Steps:
        steps = honest(*arguments)  # type: ignore[arg-type]
        yield next(steps)
        event()
        yield from steps

    return train


def weights(setting: str = "5w1s", algorithm: str = "maml") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(f"models/{setting}/{algorithm}").glob("*.safetensors")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_goes_on(number: int, data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first validation: a sentence, a checkpoint, and in the end the same weights of both seeds."""
    stage(meta_train.app, "maml", "5w1s")
    whole = weights()
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it
    with monkeypatch.context() as patch:
        patch.setattr(meta_train, "train", until(lambda: os.kill(os.getpid(), number)))
        stopped = CliRunner().invoke(meta_train.app, ["maml", "5w1s"])
    signal.signal(signal.SIGINT, heard)
    assert stopped.exit_code == 128 + number
    assert stopped.output.splitlines()[-1] == "maml 5w1s: stopped; the same command goes on from meta-step 2"
    assert len(list(Path(".checkpoints").iterdir())) == 1
    said = stage(meta_train.app, "maml", "5w1s")
    assert "goes on from meta-step 2" in said and not list(Path(".checkpoints").iterdir())
    assert weights() == whole and len(whole) == 2


def test_a_finished_training_outlives_what_fails_after_it(data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen failing with a checkpoint that goes before the model is in its place."""

    def full(*_: object, **__: object) -> None:
        raise ValueError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        assert "the disk is full" in stage(meta_train.app, "maml", "5w1s", fails=True)
    assert not list(Path("models/5w1s").iterdir())
    said = stage(meta_train.app, "maml", "5w1s")
    assert "goes on from meta-step 4" in said and "meta-step 2 of" not in said
    assert not list(Path(".checkpoints").iterdir()) and len(weights()) == 2


def test_the_second_of_two_takes_what_the_first_has_trained(
    data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second one, of another experiment, is a process of its own; the first ends while it waits."""
    second = tmp_path / "second"
    second.mkdir()
    for name in ("params.yaml", "dvc.yaml", "data"):
        (second / name).symlink_to(tmp_path / name)
    command = [sys.executable, "-m", "stages.meta_train", "maml", "5w1s"]
    environment = os.environ | {"DVC_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    said = list[str]()

    def start() -> None:
        process = subprocess.Popen(command, cwd=second, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        said.extend(iter(process.stdout.readline, "maml 5w1s: the same training runs in another process; waiting\n"))
        running.append(process)

    running = list[subprocess.Popen[str]]()
    monkeypatch.setattr(meta_train, "train", until(start))
    stage(meta_train.app, "maml", "5w1s")
    after, _ = running[0].communicate(timeout=120)
    assert running[0].returncode == 0
    assert "maml 5w1s: goes on from meta-step 4" in after and "meta-step 2 of" not in after
    one, other = (Path(place) / "models/5w1s/maml" for place in (".", second))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }
    assert not list(Path(".checkpoints").iterdir())


def test_values_changed_during_a_training_are_noticed(
    data: None, edit: Edit, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next validation, here the last one; with the old values, nothing is trained again."""

    def retuned(rate: float) -> None:
        edit(algorithms__maml__quick__common__inner_lr=rate)
        stage(cells.app)

    with monkeypatch.context() as patch:
        patch.setattr(meta_train, "train", until(lambda: retuned(0.3)))
        said = stage(meta_train.app, "maml", "5w1s", fails=True)
    assert "data/cells/5w1s/maml.json changed while meta_train@maml-5w1s ran" in said and "best at" not in said
    assert not Path("models/5w1s/maml").exists()
    retuned(0.4)
    assert "goes on from meta-step 4" in stage(meta_train.app, "maml", "5w1s")


def test_a_checkpoint_belongs_to_one_training_alone(data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is another with other values, data, engine, device, PyTorch or code; a stray file beside the code is none."""
    for package in ("metalib", "stages"):
        shutil.copytree(ROOT / package, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(metalib, "__path__", ["metalib"])
    monkeypatch.setattr(params, "__file__", "stages/params.py")
    monkeypatch.setattr(meta_train, "__file__", "stages/meta_train.py")
    cpu, seen = torch.device("cpu"), set[str]()

    def new(cell: params.Cell, device: torch.device = cpu) -> bool:
        before = len(seen)
        seen.add(meta_train.fingerprint(cell, device))
        return len(seen) > before

    cell = files.load_cell("5w1s", "maml")
    assert new(cell)
    for place in ("metalib/models/.conv4.py.swp", "metalib/conv4.py~", "metalib/.ipynb_checkpoints/tree-checkpoint.py"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).touch()
        assert not new(cell)
    changes: list[Callable[[], object]] = [
        *(lambda path=path: path.write_bytes(path.read_bytes() + b" ") for path in map(Path, (
            "data/characters.npz", "data/tasks/5w1s.npz", "metalib/tree.py", "metalib/models/native.cpp",
            "metalib/algorithms/maml.py", "stages/meta_train.py", "stages/params.py",
        ))),
        lambda: monkeypatch.setattr(meta_train, "engine", lambda *_: "another"),
        lambda: monkeypatch.setattr(torch, "__version__", "3.0"),
    ]  # fmt: skip
    for make in changes:
        make()
        assert new(cell)
    assert new(cell, torch.device("cuda"))
    for name, value in (("seeds", [0]), ("learner", cell.learner | {"inner_lr": 0.3}), ("tf32", True), ("train_shot", 2)):
        assert new(cell.model_copy(update={name: value}))


def test_damaged_data_are_named(data: None, stage: Stage) -> None:
    """Seen failing: an empty file ended in "Aborted."."""
    for file, remake in (("data/characters.npz", "preprocess"), ("data/tasks/5w1s.npz", "split@5w1s")):
        content = Path(file).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (b"", content[:middle], flipped):
            Path(file).write_bytes(damaged)
            said = stage(meta_train.app, "maml", "5w1s", fails=True)
            assert re.search(rf"error: {file} cannot be read \(.+\); make it with: dvc repro {remake}$", said)
        Path(file).write_bytes(content)


def test_the_bar_keeps_count_rate_and_time_left_at_80_columns() -> None:
    """The longest name and count there are; seen failing with the query loss in it."""
    columns = meta_train.columns("maml_truncated 20w1s")
    console = Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    with Bar(*columns, console=console, expand=True) as bar:
        bar.add_task("", total=100_000, completed=99_999, rate="123.4 steps/s", news="98.70 %")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "99999/100000" in shown and "123.4 steps/s" in shown and "-:--:--" in shown and "98.70 %" in shown


def test_divergence_names_algorithm_setting_seed_and_step(data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two seeds, from the start on: the other is trained to its end, and not again when the stage is run again."""
    finite = torch.tensor([1.0, 1.0, math.nan, math.nan])  # of two tasks of each seed, of which the second one's diverge

    def loss(network: Conv4, support: int | None) -> TaskLoss:
        honest = Conv4Loss(network, support)
        return lambda params, x, y: honest(params, x, y) * finite

    monkeypatch.setattr(meta_train, "Conv4Loss", loss)
    for first in (True, False):
        said = stage(meta_train.app, "maml", "5w1s", fails=True)
        sentence = "error: maml 5w1s seed 1: the query loss or the meta-gradient stopped being finite after meta-step 0; "
        assert said.endswith(sentence + "nothing is recorded, lower inner_lr or outer.lr")
        assert "maml 5w1s seed 1: diverged; the others are trained to their end" in said
        assert ("maml 5w1s: meta-step 2 of 4" in said) == first and ("goes on from meta-step 4" in said) != first
    assert not Path("models/5w1s/maml").exists()


def test_a_split_that_cannot_serve_the_setting_is_refused(edit: Edit, stage: Stage) -> None:
    edit()
    stage(fetch.app)
    stage(preprocess.app)
    said = stage(split.app, "20w1s", fails=True)
    assert "setting 20w1s, validation characters of split.scheme characters: way: 20 classes" in said
    edit(split__validation=30)
    assert "split.validation 30 and split.test 8 leave none of 35 characters" in stage(split.app, "5w1s", fails=True)
    assert not Path("data/tasks").exists() or not list(Path("data/tasks").iterdir())


def test_stages_out_of_order_say_what_to_run(edit: Edit, stage: Stage) -> None:
    edit()
    assert "dvc repro preprocess" in stage(split.app, "5w1s", fails=True)
    assert "dvc repro cells" in stage(meta_train.app, "maml", "5w1s", fails=True)
    stage(cells.app)
    assert "dvc repro split@5w1s" in stage(meta_train.app, "maml", "5w1s", fails=True)
    assert "dvc repro meta_train@maml-5w1s" in stage(evaluate.app, "maml", "5w1s", fails=True)
    assert "dvc repro compare@5w1s" in stage(compare.app, "5w1s", fails=True)
    assert "'mamel'" in stage(meta_train.app, "mamel", "5w1s", fails=True)


def test_an_unusable_device_is_refused(data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALIB_DEVICE", "tpu")
    assert "METALIB_DEVICE: 'tpu' cannot be used here" in stage(meta_train.app, "maml", "5w1s", fails=True)


@pytest.mark.parametrize(("asked", "current"), [("cuda", []), ("cuda:1", [1])])
def test_a_gpu_that_is_named_becomes_the_current_one(asked: str, current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen failing where `cuda`, which names none, went to set_device: it refuses a device without an index."""
    made = list[int]()
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made.append)
    monkeypatch.setenv("METALIB_DEVICE", asked)
    assert str(command.chosen_device()) == asked and made == current


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_help(name: str, stage: Stage) -> None:
    assert "Usage" in stage(STAGES[name].app, "--help")


def test_an_experiment_through_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc exp run --temp` of one cell, in a copy of the project with tiny params; the workspace stays as it was."""
    monkeypatch.delenv("OMNIGLOT_MIRROR", raising=False)

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    copy_project(tmp_path)
    shrink(tmp_path / "params.yaml")
    alone = {f"algorithms.{name}": None for name in names if name != "maml"}  # DVC takes seconds to read all cells
    change(tmp_path / "params.yaml", alone | {"settings": ["5w1s"], "studies.protocols.common.learners": ["maml"]})
    run("git", "init", "--quiet")
    run("git", "add", ".")
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "tiny")
    dvc = (sys.executable, "-m", "dvc")
    rate = "algorithms.maml.quick.common.inner_lr=0.2"
    run(*dvc, "exp", "run", "--temp", "--name", "try", "-S", rate, "evaluate@maml-5w1s")
    shown = json.loads(run(*dvc, "metrics", "diff", "--json", "HEAD", "try"))
    assert 0 < shown["metrics/5w1s/maml.json"]["accuracy"]["new"] <= 100
    curve = "plots/5w1s/maml/learning_curve.csv"
    assert run("git", "show", f"{run('git', 'for-each-ref', '--format=%(objectname)', 'refs/exps').split()[0]}:{curve}")
    assert run("git", "status", "--porcelain") == ""
