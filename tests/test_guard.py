"""A stage refuses to write when what dvc.yaml declares for it changed while it ran."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML
from typer.testing import CliRunner

from metalib import evaluation
from stages import evaluate, files, guard, meta_train
from stages.command import one_sentence
from tests.conftest import ROOT, Stage, change, copy_project, shrink

PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
TINY = """
stages:
  tiny:
    matrix: {size: [1, 2]}
    cmd: none
    deps: [code.py, "folder/${item.size}"]
    params: [budget, "budgets.${budget}", other.name]
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], str]:
    """Run a stage with a code file, a folder and parameters, whose work is the argument; returns what it says."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(TINY)
    Path("params.yaml").write_text(
        "{budget: quick, budgets: {quick: {lr: 1, n: .nan}, paper: {lr: 1}}, other: {name: a, b: 1}}"
    )
    Path(".dvcignore").write_text("*.part\n__pycache__\n")
    Path("code.py").write_text("old")
    for folder in ("folder/1", "folder/2"):
        Path(folder).mkdir(parents=True)
        Path(folder, "data").write_text("old")
    Path("out").write_text("before")

    def run(work: Callable[[], None]) -> str:
        app = typer.Typer()

        @app.command()
        @one_sentence
        @guard.guarded("tiny")
        def main(size: int) -> None:
            work()
            with files.whole(Path("out")) as beside:
                beside.write_text("after")

        outcome = CliRunner().invoke(app, ["1"])
        assert outcome.exit_code == int("error" in outcome.output) and not Path(".out.part").exists()
        return " ".join(outcome.output.split())

    return run


@pytest.mark.parametrize(
    ("named", "work"),
    [
        ("code.py", lambda: Path("code.py").write_text("new")),
        ("code.py", lambda: Path("code.py").unlink()),
        ("folder/1/data", lambda: Path("folder/1/data").write_text("new")),
        ("folder/1/more", lambda: Path("folder/1/more").write_text("new")),
        ("folder/1", lambda: shutil.rmtree("folder/1")),
        ("params.yaml: budgets.quick.lr", lambda: change(Path("params.yaml"), {"budgets.quick.lr": 2})),
        ("params.yaml: budgets.quick.new", lambda: change(Path("params.yaml"), {"budgets.quick.new": 1})),
        ("params.yaml: budget", lambda: change(Path("params.yaml"), {"budget": "paper"})),
        ("params.yaml: other.name", lambda: change(Path("params.yaml"), {"other.name": None})),
        ("params.yaml: budget", lambda: Path("params.yaml").write_text("{ half")),
    ],
)
def test_a_change_while_a_stage_runs_is_refused_by_name(tiny: Callable[..., str], named: str, work: Callable[[], None]) -> None:
    said = tiny(work)
    assert f"error: {named} " in said and "changed while tiny@1 ran" in said and "run it again" in said
    assert Path("out").read_text() == "before"


@pytest.mark.parametrize(
    "work",
    [
        lambda: None,
        lambda: Path("code.py").write_text("old"),
        lambda: Path("folder/2/data").write_text("new"),  # another item's
        lambda: Path("folder/1/some.part").write_text("new"),
        lambda: change(Path("params.yaml"), {"other.b": 2, "budgets.paper.lr": 3}),
    ],
)
def test_what_a_stage_does_not_depend_on_may_change(tiny: Callable[..., str], work: Callable[[], None]) -> None:
    assert tiny(work) == "" and Path("out").read_text() == "after"


def test_a_change_between_two_outputs_fails_the_stage(tiny: Callable[..., str]) -> None:
    """So that DVC records neither."""

    def work() -> None:
        with files.whole(Path("first")) as beside:
            beside.write_text("written")
        Path("code.py").write_text("new")

    assert "code.py changed" in tiny(work) and Path("first").exists() and Path("out").read_text() == "before"


@pytest.mark.parametrize("name", PIPELINE)
def test_every_stage_is_guarded(name: str, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    """Under its own name, with a value for each item of its matrix; and the guard understands what it declares."""
    monkeypatch.chdir(ROOT)
    declared = PIPELINE[name]
    assert all(isinstance(entry, str) for entry in (*declared["deps"], *declared.get("params", [])))
    began = list[guard.Inputs]()

    class Noted(guard.Inputs):
        def __init__(self, stage: str, item: dict[str, object]):
            super().__init__(stage, item)
            began.append(self)
            raise ValueError("noted")

    monkeypatch.setattr(guard, "Inputs", Noted)
    module = declared["cmd"].split()[2]
    found = import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
    known = {"algorithm": "maml", "setting": "5w1s", "study": "protocols"}
    arguments = [known[item] for item in declared.get("matrix", {})]
    assert "noted" in stage(found.app, *arguments, fails=True)
    assert began[0].name == "@".join(filter(None, [name, "-".join(arguments)]))
    assert not [text for text in (*began[0].deps, *began[0].keys, *began[0].began) if "$" in text or "None" in text]
    code = {dep for dep in began[0].deps if not dep.startswith(("data", "models", "metrics", "plots", "results"))}
    assert all((ROOT / dep).exists() for dep in code)


def test_evaluate_leaves_old_results_when_its_data_change(data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of test tasks is changed while it tests."""
    for app in (meta_train.app, evaluate.app):
        stage(app, "maml", "5w1s")
    places = [path for place in ("metrics", "plots", "results") for path in Path(place).rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in places}
    honest = evaluation.evaluate

    def tested(*arguments: object) -> evaluation.Accuracy:
        (files.CELLS / "5w1s.json").write_text('{"test_tasks": 3}')
        return honest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "evaluate", tested)
    assert "data/cells/5w1s.json changed while evaluate@maml-5w1s ran" in stage(evaluate.app, "maml", "5w1s", fails=True)
    assert before == {path: path.read_bytes() for path in places} and len(before) == 5


def test_dvc_records_nothing_of_a_stage_whose_code_changed_while_it_was_loaded(tmp_path: Path) -> None:
    """Through `dvc repro` in a copy of the project, whose training.py edits itself before the stage's main begins."""
    copy_project(tmp_path)
    shrink(tmp_path / "params.yaml")
    with open(tmp_path / "metalib/training.py", "a") as code:
        code.write("\nwith open(__file__, 'a') as code:\n    code.write('# new')\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    repro = [sys.executable, "-m", "dvc", "repro", "cells"]
    done = subprocess.run(repro, cwd=tmp_path, capture_output=True, text=True)
    assert "error: metalib/training.py changed while cells ran" in done.stderr, done.stdout + done.stderr
    assert done.returncode and not (tmp_path / "dvc.lock").exists() and not (tmp_path / "data/cells").exists()
