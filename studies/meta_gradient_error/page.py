"""The study's page, figure, data and metrics from what it has found."""

from typing import Any

from studies import room
from studies.meta_gradient_error import figure
from studies.meta_gradient_error.curves import COSTED, LINES, CurvePoint, Rate, exponents
from studies.meta_gradient_error.schema import Values

NAME = "meta_gradient_error"


def write(found: dict[str, Any]) -> None:
    values = Values(**found["values"])
    errors = [CurvePoint(**row) for row in found["curves"]]
    rates = [Rate(**row) for row in found["rates"]]
    powers = exponents(rates)
    room.write(
        NAME,
        figure=figure.draw(values, errors, rates),
        page=page(values, found["budget"], errors, rates),
        data={"curves": found["curves"], "rates": found["rates"]},
        metrics={
            "maml_cost_exponent": round(powers["MAML, gradient descent"], 3),
            "imaml_cost_exponent": round(powers["iMAML, Nesterov"], 3),
        },
    )


def page(values: Values, budget: str, errors: list[CurvePoint], rates: list[Rate]) -> str:
    kappas = sorted(values.kappas)
    known = {(rate.method, rate.kappa): rate for rate in rates}
    powers = exponents(rates)
    tables: dict[str, Any] = {
        "rates": [
            [line.name, line.step, *(f"{known[line.name, k].decay:.4f} ({known[line.name, k].theory:.4f})" for k in kappas)]
            for line in LINES
        ],
        "costs": [
            [line.name, line.slide, *(f"{known[line.name, k].products:.0f}" for k in kappas), f"{powers[line.name]:.2f}"]
            for line in COSTED
        ],
    }
    ends = {point.method: point for point in errors}
    heads = [f"kappa {kappa:g}" for kappa in kappas]
    return room.render(NAME, v=values, budget=budget, ends=list(ends.values()), heads=heads, **tables)
