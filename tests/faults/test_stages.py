"""Each stage is ended at random moments, before each operation on a file and within each write, and run again."""

import os
import random
import signal
import time

import pytest

from tests.faults.conftest import Table, Trials
from tests.faults.process import Ended, Process, break_off_after, die_before
from tests.faults.project import STAGES, Project

pytestmark = pytest.mark.slow
TIMES = 20  # at random moments, for each stage and signal
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_a_random_moment(stage: str, sent: signal.Signals, project: Project, table: Table) -> None:
    """Half of the times beside the results of other params, half of the times without."""

    def some(project: Project, first: int, step: int) -> Trials:
        trials = Trials()
        for number in range(first, TIMES, step):
            stale, share = number % 4 < 2, random.Random(f"{stage} {sent.name} {number}").random()
            while (ended := struck(project, stage, sent, share, stale)) is None:
                share *= 0.9  # it was too late
            with trials.trial(f"{ended.status} after {ended.operations} operations, {ended.last}: {ended.said}"):
                assert "Traceback" not in ended.said or ended.said.endswith("KeyboardInterrupt\n"), "another error"
                project.resume(stage, stale)
        return trials

    table.fill(stage, sent.name, project, some)


def struck(project: Project, stage: str, sent: signal.Signals, share: float, stale: bool) -> Ended | None:
    """How the stage ended that got the signal after this share of its time; None when it had ended before."""
    project.prepare(stage, stale)
    began = time.monotonic()
    process = Process(STAGES[stage], project.folder)
    while (runs := process.runs()) and time.monotonic() < began + share * project.seconds[stage]:
        time.sleep(0.002)
    if runs:
        os.kill(process.pid, sent)
        return process.end()
    project.seconds[stage] = time.monotonic() - began
    process.end()
    return None


@pytest.mark.parametrize("stage", STAGES)
def test_death_before_each_operation_on_a_file(stage: str, project: Project, table: Table) -> None:
    """And so after each: on the disk, nothing differs between after one and before the next."""

    def some(project: Project, first: int, step: int) -> Trials:
        trials, number = Trials(), first
        while True:
            project.prepare(stage, stale=True)
            ended = Process(STAGES[stage], project.folder, die_before(number)).end()
            if ended.status == 0:
                return trials
            with trials.trial(f"before operation {number}, {ended.last}: {ended.said}"):
                assert ended.status == -signal.SIGKILL, "ended by itself"
                project.resume(stage, stale=True)
            number += step

    table.fill(stage, "operation", project, some)


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
