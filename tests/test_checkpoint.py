"""Checkpoints: a stopped training ends as it would have, damage is noticed, two processes share one training."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from metalib import files, training
from metalib.checkpoint import Checkpoint, keep
from tests.test_training import OPTIMISERS, every_optimiser, poisoned, result, run


def stopped(optimiser: str, path: Path, step: int, seeds: tuple[int, ...] = (0,)) -> None:
    """A training that ends after the report of this meta-step; there are validations, and so checkpoints, at 2, 4 and 6."""
    for now in run(OPTIMISERS[optimiser], path, seeds):
        assert isinstance(now, training.Progress)
        if now.step == step:
            return


def same(one: training.Result, other: training.Result) -> bool:
    """To the bit: weights, best step, history."""
    weights = zip(one.params, other.params, strict=True)
    return one[1:] == other[1:] and all(torch.equal(a[name], b[name]) for a, b in weights for name in a | b)


@every_optimiser
@pytest.mark.parametrize("step", [2, 3, 5, 6])
@pytest.mark.parametrize("seeds", [(0,), (3, 4)])
def test_a_stopped_training_ends_as_it_would_have(optimiser: str, step: int, seeds: tuple[int, ...], tmp_path: Path) -> None:
    """Seen failing without the generator's state, and without the optimisers', in the checkpoint."""
    path = tmp_path / "kept" / "run.pt"
    stopped(optimiser, path, step, seeds)
    again = run(OPTIMISERS[optimiser], path, seeds)
    first = next(again)
    assert isinstance(first, training.Progress) and first.step == step // 2 * 2
    assert same(result(again), result(run(OPTIMISERS[optimiser], seeds=seeds)))
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


def test_divergence_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(training.Diverged, match=r"stopped being finite after meta-step 3$"):
        list(run(OPTIMISERS["adam"], path, sample=poisoned({4: [0, 1]})))
    state = Checkpoint(path).load(torch.device("cpu"))
    assert state and state["step"] == 2 and all(v.isfinite().all() for v in state["params"].values())


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-4000] + bytes(255 - byte for byte in content[-4000:-3992]) + content[-3992:],
    "another program's": lambda content: b"PK" + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_training_starts_afresh(damage: str, tmp_path: Path) -> None:
    """Seen failing: an EOFError, a RuntimeError, and flipped bits that were accepted."""
    path, said = tmp_path / "run.pt", list[str]()
    stopped("muon", path, 4)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert Checkpoint(path, said.append).load(torch.device("cpu")) is None
    assert said == [f"{path} is damaged, so what it holds is not used, and the training starts afresh"] and not path.exists()
    assert same(result(run(OPTIMISERS["muon"], path)), result(run(OPTIMISERS["muon"])))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    Checkpoint(path).save(step=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        ValueError, match=r"run.pt cannot be written \(No space left on device\); when that is mended, the same"
    ):
        Checkpoint(path).save(step=4)
    assert Checkpoint(path).load(torch.device("cpu")) == {"step": 2}
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------ one process at a time


def test_a_checkpoint_is_kept_until_its_training_has_ended_well(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "run.pt"
    with pytest.raises(ZeroDivisionError), keep(path) as checkpoint:
        checkpoint.save(step=1)
        1 / 0  # noqa: B018
    assert list(path.parent.iterdir()) == [path]
    with keep(path) as checkpoint:
        assert checkpoint.load(torch.device("cpu")) == {"step": 1}
    assert not list(path.parent.iterdir())


def test_the_second_waits_and_is_left_what_the_first_has(tmp_path: Path) -> None:
    """Three of them, one after the other. Seen failing without the lock, and without the mark of those that wait."""
    path = tmp_path / "run.pt"
    waiting, found = threading.Semaphore(0), list[int]()

    def another() -> None:
        with keep(path, lambda said: waiting.release()) as checkpoint:
            state = checkpoint.load(torch.device("cpu"))
            found.append(state["step"] if state else 0)
            checkpoint.save(step=found[-1] + 1)

    others = [threading.Thread(target=another) for _ in range(2)]
    with keep(path) as checkpoint:
        for other in others:
            other.start()
            assert waiting.acquire(timeout=60)
        assert not found
        checkpoint.save(step=1)
    for other in others:
        other.join()
    assert found == [1, 2] and not list(tmp_path.iterdir())


def hold(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with keep(path) as checkpoint, files.whole(path.with_suffix(".json")) as beside:
        checkpoint.save(step=1)
        beside.mkdir()
        ready.set()
        signal.pause()


def test_a_killed_process_holds_nothing_up_and_is_cleared_away(tmp_path: Path) -> None:
    """SIGKILL while it holds the lock and writes a folder. Seen failing with a name that depends on the path alone."""
    context = multiprocessing.get_context("fork")
    path, ready = tmp_path / "run.pt", context.Event()
    process = context.Process(target=hold, args=(path, ready), daemon=True)
    process.start()
    assert ready.wait(60) and process.pid
    with files.whole(path.with_suffix(".json")) as beside:  # of one that lives, nothing is taken
        beside.write_text("mine")
    assert len(list(tmp_path.glob("*.part"))) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with keep(path, pytest.fail) as checkpoint:
        assert checkpoint.load(torch.device("cpu")) == {"step": 1}
        with files.whole(path.with_suffix(".json")) as beside:
            beside.write_text("again")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"] and path.with_suffix(".json").read_text() == "again"


# ------------------------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("first", ["file", "folder"])
@pytest.mark.parametrize("second", ["file", "folder"])
def test_the_later_of_two_writers_stays(first: str, second: str, tmp_path: Path) -> None:
    """They write at the same time, over something that is there."""

    def write(place: Path, kind: str) -> None:
        if kind == "folder":
            place.mkdir()
            (place / "part").write_text(kind)
        else:
            place.write_text(kind)

    path = tmp_path / "made"
    path.mkdir()
    (path / "old").write_text("old")
    with files.whole(path) as outer:
        write(outer, first)
        with files.whole(path) as inner:
            write(inner, second)
        assert path.is_dir() == (second == "folder")
    assert [file.name for file in path.iterdir()] == ["part"] if first == "folder" else path.read_text() == "file"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole(path) as beside:
        beside.write_text("new")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
