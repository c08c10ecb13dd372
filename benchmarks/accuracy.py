"""Seconds of meta-training to 90, 95 and 97 % validation accuracy, 5-way 1-shot.

For the trained models of budget quick: the meta-steps in their histories, times the measured cost of one. MAML with its
published values is trained here, for as long as the limit allows. Neither validation nor the start of a stage counts.
"""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import report, step_cost
from metalib.training import Progress
from stages import command, files, meta_train, params

SETTING = "5w1s"
GOALS = (90, 95, 97)  # %
HEAD = ["learner", "budget", "meta-steps", "ms per meta-step", *(f"{goal} %" for goal in GOALS), "best", "at"]
Curve = list[tuple[int, float]]
"""(meta-step, validation accuracy in %) of each validation."""
app = typer.Typer(add_completion=False)


@app.command()
@command.one_sentence
def main(
    limit: Annotated[float, typer.Option(help="seconds for MAML with its published values")] = 300.0,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "accuracy.md",
) -> None:
    """Write a table of seconds. Needs the trained models: dvc repro compare@5w1s."""
    file = params.read()
    if file.meta_train.budget != "quick":
        raise ValueError(f"meta_train.budget: {file.meta_train.budget}, but this reads models of budget quick; train those")
    device = command.prepared(file.meta_train.tf32)
    head = report.header("Time to accuracy", "benchmarks.accuracy", device)
    cells = [params.cell(file, algorithm, SETTING, budget="quick") for algorithm in file.algorithms]
    published = params.cell(file, "maml", SETTING, budget="paper")
    rows = []
    for cell in [*cells, published.model_copy(update={"seeds": published.seeds[:1]})]:
        cost = step_cost.seconds_per_step(cell, device)
        curve = trained(cell) if cell.budget == "quick" else list(train(cell, device, steps=limit / cost))
        rows.append(row(cell, cost, curve))
        typer.echo(" ".join(rows[-1]))
        report.write(
            out,
            head,
            f"{SETTING}, one seed: seconds of meta-training until a validation first finds an accuracy; there are only a few "
            "validations in a training. Then the best accuracy, and the seconds to it.",
            report.table(HEAD, rows, left=2),
        )


def trained(cell: params.Cell) -> Curve:
    """From the history of a trained model."""
    path = files.model_folder(cell.setting, cell.algorithm) / f"seed{cell.seeds[0]}.csv"
    try:
        with open(path) as file:
            return [(int(row["step"]), float(row["validation"])) for row in csv.DictReader(file) if row["validation"]]
    except OSError:
        raise ValueError(f"{path} is missing; make it with: dvc repro meta_train@{cell.algorithm}-{cell.setting}") from None


def train(cell: params.Cell, device: torch.device, steps: float) -> Iterator[tuple[int, float]]:
    """The same from a training that is broken off after `steps` meta-steps."""
    outer = dataclasses.replace(cell.outer, validations=max(1, cell.outer.meta_steps // 250))
    cell = cell.model_copy(update={"outer": outer})
    for now in meta_train.train(cell, files.load_tasks(SETTING), device):
        if isinstance(now, Progress):
            if now.validation:
                yield now.step, 100 * now.validation[0]
            if now.step >= steps:
                return


def row(cell: params.Cell, cost: float, curve: Curve) -> list[str]:
    reached = [next((f"{cost * step:.0f}" for step, accuracy in curve if accuracy >= goal), "") for goal in GOALS]
    best, at = max(((accuracy, step) for step, accuracy in curve), default=(0.0, 0))
    last = max((step for step, _ in curve), default=0)
    return [cell.algorithm, cell.budget, str(last), f"{1000 * cost:.1f}", *reached, f"{best:.2f}", f"{cost * at:.0f}"]


if __name__ == "__main__":
    app()
