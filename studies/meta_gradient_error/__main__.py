"""python -m studies.meta_gradient_error"""

import time
from typing import Any

import torch
import typer

from stages import params
from stages.command import one_sentence
from stages.guard import guarded
from studies import room
from studies.meta_gradient_error import figure
from studies.meta_gradient_error.curves import COSTED, LINES, CurvePoint, Rate, curves, exponents, rates
from studies.meta_gradient_error.schema import Values

app = typer.Typer(add_completion=False)
NAME = "meta_gradient_error"


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Write the study meta_gradient_error: figure, page, data, metrics. It runs in double precision on the CPU."""
    began = time.monotonic()
    file = params.read()
    values = params.study(file, NAME, Values)
    budget = file.studies[NAME].budget
    errors = curves(values)
    try:
        table = rates(values)
    except ValueError as error:
        raise ValueError(f"studies.{NAME}.{budget}: {error}") from None
    found = exponents(table)
    room.write(
        NAME,
        figure=figure.draw(values, errors, table),
        page=page(values, budget, errors, table),
        data={"curves": [point._asdict() for point in errors], "rates": [rate._asdict() for rate in table]},
        metrics={
            "maml_cost_exponent": round(found["MAML, gradient descent"], 3),
            "imaml_cost_exponent": round(found["iMAML, Nesterov"], 3),
        },
        device=torch.device("cpu"),
        began=began,
    )


def page(values: Values, budget: str, errors: list[CurvePoint], table: list[Rate]) -> str:
    kappas = sorted(values.kappas)
    known = {(rate.method, rate.kappa): rate for rate in table}
    found = exponents(table)
    tables: dict[str, Any] = {
        "rates": [
            [line.name, line.step, *(f"{known[line.name, k].decay:.4f} ({known[line.name, k].theory:.4f})" for k in kappas)]
            for line in LINES
        ],
        "costs": [
            [line.name, line.slide, *(f"{known[line.name, k].products:.0f}" for k in kappas), f"{found[line.name]:.2f}"]
            for line in COSTED
        ],
    }
    ends = {point.method: point for point in errors}
    heads = [f"kappa {kappa:g}" for kappa in kappas]
    return room.render(NAME, v=values, budget=budget, ends=list(ends.values()), heads=heads, **tables)


if __name__ == "__main__":
    app()
