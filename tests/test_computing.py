"""A study that was stopped goes on, and ends as it would have."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from metalib.checkpoint import Checkpoint
from stages import cells, files, params
from studies import computing
from studies.leap_comparison.__main__ import app as leap_app
from studies.meta_gradient_error.schema import Values
from studies.protocols.__main__ import app as protocols_app
from studies.update_contents.__main__ import app as update_app
from tests import test_leap_comparison, test_update_contents
from tests.conftest import Edit, Stage

LEAP = {f"studies__leap_comparison__quick__{key}": value for key, value in {"alphabets": [1], "seeds": [3]}.items()}
UPDATE = {"studies__update_contents__common__coefficients__gradients": [2]}
PROTOCOLS = {
    "studies__protocols__common__learners": ["fomaml", "maml"],
    "studies__protocols__quick": {"share": 1.0, "seeds": 1, "test_tasks": 2, "queries": [1], "schemes": ["characters"]},
}


@pytest.fixture
def values(edit: Edit) -> Values:
    edit()
    return params.study(params.read(), "meta_gradient_error", Values)


def run(values: Values, stop_in: str = "", device: str = "cpu", facts: Any = None) -> list[str]:
    """A study of two parts, each with a tensor; returns the names of those that were computed."""
    computed = list[str]()

    def make(name: str) -> tuple[torch.Tensor, dict[str, float]]:
        if name == stop_in:
            raise KeyboardInterrupt
        computed.append(name)
        return torch.arange(3.0) / 7, {name: 0.1}

    with computing.study("meta_gradient_error", values, torch.device(device), facts) as study:
        for name in ("first", "second, 0.5"):
            tensor, numbers = study.part(name, lambda _, name=name: make(name))  # type: ignore[misc]
            assert torch.equal(tensor, torch.arange(3.0) / 7) and numbers == {name: 0.1}
        study.write(found=numbers)
    return computed


def stop(values: Values, part: str) -> None:
    with pytest.raises(typer.Exit) as stopped:
        run(values, part)
    assert stopped.value.exit_code == 130


def kept() -> list[Path]:
    return [path for path in Path(".checkpoints").rglob("*") if path.is_file()]


def test_finished_parts_are_kept_until_the_study_is_written(values: Values, capsys: pytest.CaptureFixture[str]) -> None:
    stop(values, "first")
    assert "stopped; the same command starts again" in capsys.readouterr().out and not kept()
    stop(values, "second, 0.5")
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "meta_gradient_error: stopped; the same command goes on from there"
    assert len(kept()) == 1 and not files.study_file("meta_gradient_error").exists()
    assert run(values) == ["second, 0.5"]
    assert "goes on after 1 finished part" in capsys.readouterr().out
    assert not kept() and files.study_file("meta_gradient_error").exists()
    assert run(values) == ["first", "second, 0.5"]


def test_what_cannot_be_written_is_kept(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(files, "write_json", full)
        run(values)
    assert run(values) == []


def test_parts_serve_no_other_study(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other values, another device or engine, another number of threads. Seen failing without the threads."""
    stop(values, "second, 0.5")
    assert run(values, facts="another engine") == ["first", "second, 0.5"]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        assert run(values) == ["first", "second, 0.5"]
    assert run(values) == ["second, 0.5"]


def test_damaged_parts_are_computed_again(values: Values) -> None:
    stop(values, "second, 0.5")
    (file,) = kept()
    file.write_bytes(file.read_bytes()[:-9])
    assert run(values) == ["first", "second, 0.5"]


@pytest.mark.parametrize(("name", "app", "changes", "saves"), [
    ("leap_comparison", leap_app, test_leap_comparison.TINY | LEAP, [1, 14]),  # in Leap's training and the joint one
    ("update_contents", update_app, test_update_contents.SMALL | UPDATE, [2, 6]),
    ("protocols", protocols_app, PROTOCOLS, [1, 5]),
])  # fmt: skip
def test_a_stopped_study_ends_as_it_would_have(
    name: str, app: typer.Typer, changes: dict[str, Any], saves: list[int],
    data: None, edit: Edit, stage: Stage, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped twice in trainings, right after a checkpoint. Seen failing with trainings that were given none."""
    edit(**changes)
    stage(cells.app)
    stage(app)
    whole = files.study_file(name).read_bytes()
    shutil.rmtree("results")
    honest, saved = Checkpoint.save, list[Path]()

    def save(self: Checkpoint, **state: Any) -> None:
        honest(self, **state)
        saved.append(self.path)
        if len(saved) in saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save)
        for count in saves:
            stopped = CliRunner().invoke(app)
            assert stopped.exit_code == 130 and f"{name}: stopped; the same command goes on from there" in stopped.output
            assert len(saved) == count and "step" in (Checkpoint(saved[-1]).load(torch.device("cpu")) or {}), saved[-1].name
            assert not files.study_file(name).exists()
        said = stage(app)
    assert "goes on from meta-step" in said and files.study_file(name).read_bytes() == whole
    assert not kept()
