"""What is tried, and the page about it."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.conftest import ROOT
from tests.faults.process import Process
from tests.faults.project import STAGES, Project

PAGE = ROOT / "docs/faults.md"
KINDS = {  # of faults that every stage meets
    "SIGKILL": "SIGKILL",
    "SIGINT": "SIGINT",
    "SIGTERM": "SIGTERM",
    "operation": "before an operation",
    "write": "within a write",
}
OTHERS = [  # and those that a training meets, surroundings included
    "a checkpoint of other params",
    "a checkpoint of other data",
    "a checkpoint of other code",
    "a checkpoint of another engine",
    "`dvc repro` and its stage killed (SIGKILL), then `dvc repro` again",
    "`dvc repro` killed while its stage lives on, then `dvc repro` again",
    "`dvc repro` stopped by Ctrl-C, then `dvc repro` again",
    "`dvc repro` ended by SIGTERM, then `dvc repro` again",
    "`dvc repro` in a shallow clone, without a home, a git identity or UTF-8",
    "`dvc exp run` in a git worktree with a detached HEAD, without them either",
]
HEAD = """# Nothing is lost

A comparison takes minutes to hours, so whatever ends it must cost nothing. `make faults` ends every stage, and one of the
studies (they share `studies/computing.py`), in every way below, on a tiny project of glyphs, runs it again, and writes this
page from what it saw. After each trial:

- no output is half-written: each is what it was before, what it becomes, or not there;
- the same command runs to its end, and then every file in the folder has the bytes of an uninterrupted run, the models of a
  training included, which goes on from its checkpoint;
- nothing else lies about: no temporary file, no lock, no checkpoint.

"""


class Trials:
    """How often a fault was tried on something, and what was lost."""

    def __init__(self) -> None:
        self.tried, self.lost = 0, list[str]()

    @contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """One of them; a failed assertion within is noted, and the next trial follows."""
        self.tried += 1
        try:
            yield
        except AssertionError as error:
            self.lost.append(f"{str(error)[:300]} ({what[-300:]})")


class Table:
    """Trials by stage, or "" for a training, and fault."""

    def __init__(self) -> None:
        self.trials = dict[tuple[str, str], Trials]()

    @contextmanager
    def of(self, stage: str, fault: str) -> Iterator[Trials]:
        trials = self.trials[stage, fault] = Trials()
        yield trials
        assert trials.tried, "nothing was tried"
        assert not trials.lost, f"{len(trials.lost)} of {trials.tried}:\n" + "\n".join(trials.lost)

    def fill(self, stage: str, fault: str, project: Project, some: Callable[[Project, int, int], Trials]) -> None:
        """The trials that `some(project, first, step)` makes, by as many processes as there are cores."""
        count = len(os.sched_getaffinity(0))

        def worker(first: int) -> None:
            print(json.dumps(vars(some(project.copy(first), first, count))))

        with self.of(stage, fault) as trials:
            for process in [Process(functools.partial(worker, first), project.folder) for first in range(count)]:
                ended = process.end(patience=3600)
                assert ended.status == 0, ended.said
                found = json.loads(ended.said.splitlines()[-1])
                trials.tried += found["tried"]
                trials.lost += found["lost"]

    def whole(self) -> bool:
        return all((stage, kind) in self.trials for stage in STAGES for kind in KINDS) and all(
            ("", other) in self.trials for other in OTHERS
        )

    def page(self) -> str:
        """Times tried, and what was lost."""

        def lost(some: list[Trials]) -> str:
            count = sum(len(trials.lost) for trials in some)
            return f"{count} of {sum(trials.tried for trials in some)} trials failed" if count else "nothing"

        lines = [["stage", *KINDS.values(), "lost"], [":--", *["--:"] * len(KINDS), ":--"]]
        for stage in STAGES:
            some = [self.trials[stage, kind] for kind in KINDS]
            lines.append([stage, *(str(trials.tried) for trials in some), lost(some)])
        everything = list(self.trials.values())
        text = (
            HEAD
            + "Times tried: signals at random moments; death before each operation on a file (so after each, too), and within\n"
        )
        text += "the first write after it, which leaves one byte:\n\n"
        text += "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text += "\n\nAnd on a training, `meta_train@maml-5w1s`:\n\n| fault or place | tried | lost |\n| :-- | --: | :-- |\n"
        text += "".join(
            f"| {other} | {self.trials['', other].tried} | {lost([self.trials['', other]])} |\n" for other in OTHERS
        )
        return f"{text}\n{sum(trials.tried for trials in everything)} trials in all; lost: {lost(everything)}.\n"


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    """It becomes the page when everything was tried, with whatever outcome."""
    made = Table()
    yield made
    if made.whole():
        PAGE.write_text(made.page())


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Figures are not drawn: it would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALIB_DEVICE", "cpu")
        patch.delenv("OMNIGLOT_MIRROR", raising=False)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setattr(Figure, "savefig", lambda figure, path, **how: Path(path).write_bytes(bytes(20_000)))
        yield Project(tmp_path_factory.mktemp("faults"))
