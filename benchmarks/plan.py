"""How long a budget takes on the machine at hand: the measured cost of a meta-step and of a test task, times how many."""

import datetime
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks import rates, report
from metalib import algorithms, evaluation
from metalib.data.tasks import Tasks
from stages import files, params
from stages.command import device, keep_heap, one_sentence, tensor_float

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
TASKS = {"cuda": 256}  # evaluated to measure; elsewhere 16
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main(
    budget: Literal["quick", "paper"] = "quick",
    out: Annotated[Path | None, typer.Option(help="default: benchmarks/results/plan-<budget>.md")] = None,
) -> None:
    """Write a table of durations. Needs the data: dvc repro split."""
    where = device()
    keep_heap()
    head = report.header(f"What budget {budget} takes", "benchmarks.plan", where)
    values = params.read().model_dump()
    values["meta_train"]["budget"] = budget
    file = params.File(**values)
    tensor_float(file.meta_train.tf32)
    rows, total = list[list[object]](), 0.0
    for algorithm in file.algorithms:
        for key in file.tasks.settings:
            row, seconds = measure(file, algorithm, key.removeprefix("s"), where)
            rows.append([*row, duration(seconds)])
            total += seconds
            typer.echo(" ".join(map(str, rows[-1])))
    text = (
        f"All cells: {duration(total)} (hours:minutes:seconds), one after the other, without the start of each stage "
        "(benchmarks/results/pipeline.md). All seeds of a cell are trained at once; a meta-step is one of each."
    )
    typer.echo(text)
    report.write(out or report.RESULTS / f"plan-{budget}.md", head, text, report.table(HEAD, rows, 2))


def measure(file: params.File, algorithm: str, setting: str, where: torch.device) -> tuple[list[object], float]:
    """A row but its last column, and the seconds of that."""
    cell = params.cell(file, algorithm, setting)
    steps = cell.outer.meta_steps
    per_step = rates.seconds_per_step(cell, algorithm, setting, where)
    row: list[object] = [algorithm, setting, f"{1000 * per_step:.1f}", steps]
    seconds = steps * per_step
    test_tasks = file.budgets[file.meta_train.budget].settings[f"s{setting}"].test_tasks
    validation_tasks = -(-steps // cell.outer.validate_every) * cell.validation_tasks
    for count, every_step in ((validation_tasks, False), (test_tasks, True)):
        per_task = seconds_per_task(cell, algorithm, setting, where, every_step)
        row += [f"{1000 * per_task:.1f}", len(cell.seeds) * count]
        seconds += len(cell.seeds) * count * per_task
    return row, seconds


def seconds_per_task(cell: params.Cell, algorithm: str, setting: str, where: torch.device, every_step: bool) -> float:
    stored = files.load_tasks(setting)
    characters = torch.from_numpy(files.load_characters().images).to(where)
    network = params.make_network(cell, way=int(stored.protocol["way"]), image_size=characters.shape[-1])
    weights = algorithms.build(algorithm, cell.learner).init(network.init(torch.Generator(where).manual_seed(0)))
    learner = algorithms.build(algorithm, cell.learner | cell.test)
    count = TASKS.get(where.type, 16)
    tasks = Tasks(*(index.to(where) for index in files.first(stored.validation, count, "tasks.validation")))
    shot = int(stored.protocol["shot"])
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
