"""`dvc repro` of a training is ended and typed again."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import Table
from tests.faults.process import PATIENCE, Process
from tests.faults.project import STAGES, Tree, make, tree

pytestmark = pytest.mark.slow
DVC = (sys.executable, "-m", "dvc")
STAGE = "meta_train@maml-5w1s"
TIMES = 2


class Dvc:
    """`dvc repro` of the stage in the background; what it says is in a file."""

    def __init__(self, folder: Path):
        self.log = folder.parent / f"said-{time.monotonic_ns()}"  # a stage that lives on writes to its own
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*DVC, "repro", STAGE], cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def runs(self) -> bool:
        return self.process.poll() is None

    def stage(self) -> psutil.Process:
        """The process that trains."""
        (python,) = [child for child in psutil.Process(self.process.pid).children(recursive=True) if "python" in child.name()]
        return python

    def wait(self) -> None:
        try:
            self.process.wait(PATIENCE)
        finally:
            self.kill()

    def kill(self) -> None:
        """With all its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tree]]:
    """A project in which all is done but the training, and the model that this will lead to."""
    folder = tmp_path_factory.mktemp("dvc") / "project"
    outer = {"meta_steps": 20, "meta_batch": 1, "validations": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALIB_DEVICE", "cpu")
        patch.delenv("OMNIGLOT_MIRROR", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        make(folder, {"algorithms.maml.quick.s5w1s.outer": outer})
        for stage in ("fetch", "preprocess", "cells", "split", "meta_train"):
            ended = Process(STAGES[stage], folder).end()
            assert ended.status == 0, ended.said
        expected = model(folder)
        shutil.rmtree(folder / "models")
        for command in (
            ["git", "init", "--quiet"],
            ["git", "add", "."],
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "tiny"],
            [*DVC, "commit", "--quiet", "--force", "fetch", "preprocess", "cells", "split@5w1s"],
        ):
            subprocess.run(command, cwd=folder, check=True)
        yield folder, expected


def model(folder: Path) -> Tree:
    return tree(folder / "models/5w1s/maml")


def killed(dvc: Dvc) -> None:
    dvc.kill()


class TooLate(Exception):
    """On a busy machine, the training has ended before the signal was sent."""


def stopped(dvc: Dvc) -> None:
    """Ctrl-C reaches every process of a terminal."""
    os.killpg(dvc.process.pid, signal.SIGINT)
    dvc.wait()
    if "best at meta-step" in dvc.said and "stopped" not in dvc.said:
        raise TooLate
    (line,) = [line for line in dvc.said.splitlines() if "stopped" in line]
    assert re.search("the same command (goes on|starts again)", line) and "Traceback" not in dvc.said, "not told how to go on"


def ended(dvc: Dvc) -> None:
    os.killpg(dvc.process.pid, signal.SIGTERM)
    dvc.wait()


def orphaned(dvc: Dvc) -> psutil.Process:
    """The stage lives on, and stands still until the next one is at the same training."""
    stage = dvc.stage()
    dvc.process.kill()
    dvc.process.wait()
    stage.suspend()  # not before: the kernel ends what stands still when its terminal's first process dies
    return stage


def nothing_lost(base: Path, folder: Path, how: Callable[[Dvc], psutil.Process | None], expected: Tree) -> None:
    """End `dvc repro` when there is a checkpoint, and type it again; AssertionError for what is not as it should be."""
    shutil.copytree(base, folder, symlinks=True)
    dvc = Dvc(folder)
    until(lambda: checkpoints(folder) or not dvc.runs())
    assert dvc.runs(), f"ended by itself: {dvc.said}"
    orphan = how(dvc)
    again = Dvc(folder)
    if orphan:
        until(lambda: "waiting" in again.said or not again.runs())
        orphan.resume()
    again.wait()
    if orphan:
        orphan.wait(PATIENCE)
        assert "waiting" in again.said, f"two at once: {again.said[-250:]}"
    assert again.process.returncode == 0, f"failed: {again.said[-250:]}"
    assert model(folder) == expected, "another model"
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".wanted"))]
    assert not left and not checkpoints(folder), f"left over: {left}, {checkpoints(folder)}"
    status = subprocess.run([*DVC, "status", STAGE], cwd=folder, capture_output=True, text=True)
    assert "up to date" in status.stdout, f"not recorded: {status.stdout}"


def checkpoints(folder: Path) -> list[Path]:
    return list((folder / ".checkpoints").glob("*.pt"))


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize(("fault", "how"), {
    "`dvc repro` and its stage killed (SIGKILL), then `dvc repro` again": killed,
    "`dvc repro` killed while its stage lives on, then `dvc repro` again": orphaned,
    "`dvc repro` stopped by Ctrl-C, then `dvc repro` again": stopped,
    "`dvc repro` ended by SIGTERM, then `dvc repro` again": ended,
}.items())  # fmt: skip
def test_the_same_command_again(
    fault: str, how: Callable[[Dvc], psutil.Process | None], trained: tuple[Path, Tree], tmp_path: Path, table: Table
) -> None:
    with table.of("", fault) as trials:
        for number in range(TIMES):
            with trials.trial(f"trial {number}"):
                for attempt in range(10):
                    with contextlib.suppress(TooLate):
                        nothing_lost(trained[0], tmp_path / f"{number}-{attempt}" / "project", how, trained[1])
                        break
                else:
                    raise AssertionError("ten times too late")


def shallow(base: Path, folder: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", base.as_uri(), folder], check=True)


def worktree(base: Path, folder: Path) -> None:
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder], cwd=base, check=True)


@pytest.mark.parametrize(("what", "place", "command"), [
    ("`dvc repro` in a shallow clone, without a home, a git identity or UTF-8", shallow, ["repro", STAGE]),
    ("`dvc exp run` in a git worktree with a detached HEAD, without them either", worktree, ["exp", "run", STAGE]),
])  # fmt: skip
def test_another_place(
    what: str,
    place: Callable[[Path, Path], None],
    command: list[str],
    trained: tuple[Path, Tree],
    tmp_path: Path,
    table: Table,
) -> None:
    """The data are copied there, and the training ends as it did at home."""
    base, folder = trained[0], tmp_path / "project"
    bare = {name: value for name, value in os.environ.items() if name != "HOME" and not name.startswith("GIT_")}
    bare |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "LC_ALL": "C"}
    with table.of("", what) as trials, trials.trial("once"):
        place(base, folder)
        for name in ("data", ".dvc/cache"):
            shutil.copytree(base / name, folder / name)
        shutil.copy(base / "dvc.lock", folder)
        done = subprocess.run([*DVC, *command], cwd=folder, env=bare, capture_output=True, text=True)
        assert done.returncode == 0, f"failed: {done.stdout[-250:]}{done.stderr[-250:]}"
        assert model(folder) == trained[1], "another model"
        assert not checkpoints(folder), "left over"
