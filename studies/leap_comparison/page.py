"""The study's page, figure, data and metrics from what it has found."""

from typing import Any

from metalib.data.omniglot import DRAWERS
from stages import params, tables
from studies import room
from studies.leap_comparison import figure, summary
from studies.leap_comparison.methods import METHODS
from studies.leap_comparison.schema import Comparison

NAME = "leap_comparison"


def write(found: dict[str, Any]) -> None:
    asked = Comparison(**found["values"])
    data = {name: found[name] for name in ("areas", "training_batches", "held_out_images")}
    areas, most = data["areas"], asked.alphabets[-1]
    section = params.read().studies[NAME]
    room.write(
        NAME,
        figure=figure.draw(asked, **data),
        page=room.render(
            NAME,
            asked=asked,
            published=section.common | section.paper,
            budget=found["budget"],
            data=found["data"],
            trained_images=DRAWERS - asked.held_out_images,
            rank=lambda key: [(summary.TITLES[method], mean) for method, mean in summary.ranked(areas, most, key)],
            numbers=lambda key, unit=1: table(areas, asked.alphabets, key, unit),
        ),
        data=data,
        metrics=summary.metrics(areas, most),
    )


def table(rows: list[summary.Row], alphabets: list[int], key: str, unit: int = 1) -> str:
    """A column of `areas` in Markdown, times `unit`: a line for each method, mean ± standard deviation for each n."""
    digits = 3 if unit == 1 else 1
    lines = [
        [summary.TITLES[method], *(f"{unit * mean:.{digits}f} ± {unit * std:.{digits}f}" for mean, std in pairs)]
        for method in METHODS
        for pairs in [[summary.over_seeds(rows, method, n, key) for n in alphabets]]
    ]
    return tables.markdown(["method", *(f"n = {n}" for n in alphabets)], lines)
