"""How long a budget takes on this machine: the measured cost of a meta-step and of a task, times their numbers."""

import datetime
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks import report, step_cost
from metalib import algorithms, evaluation
from stages import command, files, params

HEAD = [
    "learner",
    "setting",
    "ms per meta-step",
    "meta-steps",
    "ms per validation task",
    "tasks",
    "ms per test task",
    "tasks",
    "together",
]
TASKS = {"cuda": 256}  # evaluated for a measurement; 16 on other devices
app = typer.Typer(add_completion=False)


@app.command()
@command.one_sentence
def main(
    budget: Literal["quick", "paper"] = "quick",
    out: Annotated[Path | None, typer.Option(help="default: benchmarks/results/plan-<budget>.md")] = None,
) -> None:
    """Write a table of durations. Needs the data: dvc repro split."""
    file = params.read()
    device = command.prepared(file.meta_train.tf32)
    head = report.header(f"What budget {budget} takes", "benchmarks.plan", device)
    rows, total = list[list[object]](), 0.0
    for algorithm in file.algorithms:
        for setting in file.settings:
            cell = params.cell(file, algorithm, setting, budget)
            row, seconds = measure(cell, params.counts(file, setting, budget).test_tasks, device)
            rows.append([*row, duration(seconds)])
            total += seconds
            typer.echo(" ".join(map(str, rows[-1])))
    text = (
        f"All cells: {duration(total)} (hours:minutes:seconds), one after the other, without the start of each stage "
        "(benchmarks/results/pipeline.md). A meta-step is one of each seed, since all seeds of a cell are trained at once."
    )
    typer.echo(text)
    report.write(out or report.RESULTS / f"plan-{budget}.md", head, text, report.table(HEAD, rows, left=2))


def measure(cell: params.Cell, test_tasks: int, device: torch.device) -> tuple[list[object], float]:
    """A row without its last column, and the seconds that belong there."""
    steps = cell.outer.meta_steps
    per_step = step_cost.seconds_per_step(cell, device)
    row: list[object] = [cell.algorithm, cell.setting, f"{1000 * per_step:.1f}", steps]
    seconds = steps * per_step
    validations = cell.outer.validations if steps else 1
    for count, every_step in ((validations * cell.validation_tasks, False), (test_tasks, True)):
        per_task = seconds_per_task(cell, device, every_step)
        row += [f"{1000 * per_task:.1f}", len(cell.seeds) * count]
        seconds += len(cell.seeds) * count * per_task
    return row, seconds


def seconds_per_task(cell: params.Cell, device: torch.device, every_step: bool) -> float:
    stored = files.load_tasks(cell.setting)
    way, shot = stored.protocol.way, stored.protocol.shot
    characters = torch.from_numpy(files.load_characters().images).to(device)
    network = params.make_network(cell, way=way, image_size=characters.shape[-1])
    weights = algorithms.build(cell.algorithm, cell.learner).init(network.init(torch.Generator(device).manual_seed(0)))
    learner = algorithms.build(cell.algorithm, cell.learner | cell.test)
    count = TASKS.get(device.type, 16)
    tasks = stored.validation.first(count, "tasks.validation").to(device)
    for _ in range(2):  # the first one is slower
        start = time.perf_counter()
        accuracy = evaluation.evaluate(learner, network, weights, characters, tasks, shot, every_step=every_step)
        accuracy.transductive.sum().item()  # waits for the device
        seconds = time.perf_counter() - start
    return seconds / count


def duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    app()
