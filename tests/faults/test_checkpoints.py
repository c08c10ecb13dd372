"""A checkpoint serves the training that left it, and no other."""

import random
from collections.abc import Callable

import pytest

import metalib
from stages import meta_train
from tests.conftest import change
from tests.faults.conftest import Table
from tests.faults.process import Process, die_before
from tests.faults.project import STAGES, Project

pytestmark = pytest.mark.slow
TIMES = 5


def params(project: Project) -> Callable[[], object]:
    change(project.folder / "params.yaml", {"algorithms.maml.quick.common.inner_lr": 0.3})
    project.run(STAGES["cells"])
    return STAGES["meta_train"]


def data(project: Project) -> Callable[[], object]:
    change(project.folder / "params.yaml", {"data.glyphs.seed": 2})
    for stage in ("fetch", "preprocess", "split"):
        project.run(STAGES[stage])
    return STAGES["meta_train"]


def code(project: Project) -> Callable[[], object]:
    """As if the library had been imported from the project, where the file is another."""
    with open(project.folder / "metalib/inner.py", "a") as file:
        file.write("# changed\n")

    def work() -> None:
        metalib.__path__[:] = [str(project.folder / "metalib")]
        STAGES["meta_train"]()

    return work


def engine(project: Project) -> Callable[[], object]:
    def work() -> None:
        meta_train.engine = lambda network, device: "another"
        STAGES["meta_train"]()

    return work


@pytest.mark.parametrize(
    ("what", "changed"), {"other params": params, "other data": data, "other code": code, "another engine": engine}.items()
)
def test_what_a_killed_training_left_serves_no_other(
    what: str, changed: Callable[[Project], Callable[[], object]], project: Project, table: Table
) -> None:
    """Killed before a random operation, so that it left one, and run with something changed."""
    library = project.folder / "metalib/inner.py"
    chance = random.Random(what)
    honest = library.read_bytes()

    def prepare() -> None:
        library.write_bytes(honest)
        project.prepare("meta_train", stale=False)

    prepare()
    count = project.run(STAGES["meta_train"]).operations
    prepare()
    project.run(changed(project))
    expected = project.model()
    with table.of("", f"a checkpoint of {what}") as trials:
        while trials.tried < TIMES:
            prepare()
            Process(STAGES["meta_train"], project.folder, die_before(chance.randrange(count))).end()
            if left := project.checkpoints():
                with trials.trial(", ".join(left)):
                    said = project.run(changed(project)).said
                    assert "goes on from" not in said and project.model() == expected, "taken up"
    prepare()
