"""Seconds of meta-training to 90, 95 and 97 % validation accuracy, 5-way 1-shot.

Of the trained models of budget quick: their histories' meta-steps, times the measured cost of one. MAML with its published
values is trained here, for as long as the limit allows. Validation and the start of a stage do not count.
"""

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import rates, report
from metalib.training import Progress
from stages import files, meta_train, params
from stages.command import device, keep_heap, one_sentence, tensor_float

SETTING = "5w1s"
GOALS = (90, 95, 97)  # %
HEAD = ["learner", "budget", "ms per meta-step", *(f"{goal} %" for goal in GOALS), "best", "at"]
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main(
    limit: Annotated[float, typer.Option(help="seconds for MAML with its published values")] = 300.0,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "accuracy.md",
) -> None:
    """Write a table of seconds. Needs the trained models: dvc repro compare@5w1s."""
    where = device()
    keep_heap()
    tensor_float(params.read().meta_train.tf32)
    head = report.header("Time to accuracy", "benchmarks.accuracy", where)
    rows = []
    for algorithm, budget in [*((name, "quick") for name in params.read().algorithms), ("maml", "paper")]:
        values = params.read().model_dump()
        values["meta_train"]["budget"] = budget
        values["budgets"]["paper"]["seeds"] = 1
        cell = params.cell(params.File(**values), algorithm, SETTING)
        cost = rates.seconds_per_step(cell, algorithm, SETTING, where)
        curve = trained(algorithm) if budget == "quick" else train(cell, algorithm, where, steps=limit / cost)
        rows.append(row(algorithm, budget, cost, list(curve)))
        typer.echo(" ".join(rows[-1]))
        report.write(
            out,
            head,
            f"{SETTING}, one seed: seconds of meta-training until validation, a few times in a training, first found so much; "
            "the best accuracy, and the seconds to it.",
            report.table(HEAD, rows, 2),
        )


def trained(algorithm: str) -> Iterable[tuple[int, float]]:
    """(meta-steps, validation accuracy in %) from the history of a trained model."""
    path = files.model_folder(SETTING, algorithm) / "seed0.csv"
    try:
        with open(path) as file:
            return [(int(row["step"]), float(row["validation"])) for row in csv.DictReader(file) if row["validation"]]
    except OSError:
        raise ValueError(f"{path} is missing; make it with: dvc repro meta_train@{algorithm}-{SETTING}") from None


def train(cell: params.Cell, algorithm: str, where: torch.device, steps: float) -> Iterable[tuple[int, float]]:
    """The same of a training that is broken off after so many meta-steps."""
    outer = dataclasses.replace(cell.outer, validate_every=250)
    cell = cell.model_copy(update={"outer": outer})
    for now in meta_train.train(cell, algorithm, SETTING, files.load_tasks(SETTING), cell.seeds, where, None):
        if isinstance(now, Progress):
            if now.validation:
                yield now.step, 100 * now.validation[0]
            if now.step >= steps:
                return


def row(algorithm: str, budget: str, cost: float, curve: list[tuple[int, float]]) -> list[str]:
    reached = [next((f"{cost * step:.0f}" for step, accuracy in curve if accuracy >= goal), "") for goal in GOALS]
    best, at = max(((accuracy, step) for step, accuracy in curve), default=(0.0, 0))
    return [algorithm, budget, f"{1000 * cost:.1f}", *reached, f"{best:.2f}", f"{cost * at:.0f}"]


if __name__ == "__main__":
    app()
