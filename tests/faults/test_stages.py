"""Each stage is ended at random moments, before each operation on a file and within each write, and run again."""

import os
import random
import signal
import time

import pytest

from tests.faults.conftest import Table
from tests.faults.process import Ended, Process, break_off_after, die_before
from tests.faults.project import STAGES, Project

pytestmark = pytest.mark.slow
TIMES = 20  # at random moments, for each stage and signal
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_a_random_moment(stage: str, sent: signal.Signals, project: Project, table: Table) -> None:
    """Half of the times beside the results of other params, half of the times without."""
    chance = random.Random(f"{stage} {sent.name}")
    with table.of(stage, sent.name) as trials:
        for number in range(TIMES):
            stale, moment = number % 2 == 0, chance.random() * project.seconds[stage]
            while (ended := struck(project, stage, sent, moment, stale)) is None:
                moment *= 0.8  # it was too late
            with trials.trial(f"{ended.status} after {ended.operations} operations, {ended.last}: {ended.said}"):
                assert "Traceback" not in ended.said or ended.said.endswith("KeyboardInterrupt\n"), "another error"
                project.resume(stage, stale)


def struck(project: Project, stage: str, sent: signal.Signals, moment: float, stale: bool) -> Ended | None:
    """How the stage ended that got the signal after so many seconds; None when it had ended before."""
    project.prepare(stage, stale)
    process = Process(STAGES[stage], project.folder)
    time.sleep(moment)
    if hit := process.runs():
        os.kill(process.pid, sent)
    ended = process.end()
    return ended if hit else None


@pytest.mark.parametrize("stage", STAGES)
def test_death_before_each_operation_on_a_file(stage: str, project: Project, table: Table) -> None:
    """And so after each: on the disk, nothing differs between after one and before the next."""
    with table.of(stage, "operation") as trials:
        for number in range(10_000):
            project.prepare(stage, stale=True)
            ended = Process(STAGES[stage], project.folder, die_before(number)).end()
            if ended.status == 0:
                return
            with trials.trial(f"before operation {number}, {ended.last}: {ended.said}"):
                assert ended.status == -signal.SIGKILL, "ended by itself"
                project.resume(stage, stale=True)


@pytest.mark.parametrize("stage", STAGES)
def test_death_within_each_write(stage: str, project: Project, table: Table) -> None:
    with table.of(stage, "write") as trials:
        number = 0
        while True:
            project.prepare(stage, stale=True)
            ended = Process(STAGES[stage], project.folder, break_off_after(number)).end()
            if ended.status == 0:
                return
            with trials.trial(f"write after operation {ended.operations - 1}, {ended.last}: {ended.said}"):
                assert ended.status == -signal.SIGXFSZ, "ended by itself"
                project.resume(stage, stale=True)
            number = max(number + 1, ended.operations)
