"""From learning curves to the numbers of the tables, the figure and the page."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from studies.leap_comparison.curves import Curves, area
from studies.leap_comparison.methods import METHODS
from studies.leap_comparison.schema import Comparison

Row = Mapping[str, Any]
TITLES = {
    "leap": "Leap",
    "reptile": "Reptile",
    "fomaml": "FOMAML",
    "maml": "MAML",
    "finetune": "multi-headed fine-tuning",
    "none": "no pre-training",
}


def areas(asked: Comparison, curves: Mapping[tuple[str, int], Curves]) -> list[Row]:
    """For each method, number of alphabets and seed: four areas and the final error, means over the test alphabets."""
    spacing = {"loss": 1, "error": 1, "held_out_loss": asked.measure_every, "held_out_error": asked.measure_every}
    rows = list[Row]()
    for (method, n), found in curves.items():
        values = {
            f"auc_{name}": area(getattr(found, name), every, asked.inner_steps).mean(1) for name, every in spacing.items()
        }
        values["final_error"] = found.held_out_error[-1].mean(1)
        rows += [
            {"method": method, "alphabets": n, "seed": seed, **{key: round(float(v[r]), 4) for key, v in values.items()}}
            for r, seed in enumerate(asked.seeds)
        ]
    return rows


def training_batches(curves: Mapping[tuple[str, int], Curves]) -> list[Row]:
    """The learning curves on each step's batch."""
    return _points({place: (found.loss, found.error) for place, found in curves.items()}, 1)


def held_out_images(asked: Comparison, curves: Mapping[tuple[str, int], Curves]) -> list[Row]:
    """The learning curves on the held-out images."""
    return _points({place: (found.held_out_loss, found.held_out_error) for place, found in curves.items()}, asked.measure_every)


def _points(curves: Mapping[tuple[str, int], tuple[Tensor, Tensor]], every: int) -> list[Row]:
    """A row for each method, number of alphabets and point of a curve: mean over seeds and test alphabets, std over seeds."""
    rows = list[Row]()
    for (method, n), pair in curves.items():
        columns = {"loss": pair[0].mean((1, 2)), "loss_std": deviation(pair[0].mean(2))}
        columns |= {"error": pair[1].mean((1, 2)), "error_std": deviation(pair[1].mean(2))}
        rows += [
            {"method": method, "alphabets": n, "inner_step": every * i}
            | {name: round(float(values[i]), 5) for name, values in columns.items()}
            for i in range(len(pair[0]))
        ]
    return rows


def deviation(values: Tensor) -> Tensor:
    """Standard deviation over seeds, the last axis; 0 if there is only one."""
    return values.std(-1, correction=min(1, values.shape[-1] - 1))


def over_seeds(rows: list[Row], method: str, n: int, key: str) -> tuple[float, float]:
    """Mean and standard deviation of a column of `areas`."""
    values = torch.tensor([row[key] for row in rows if (row["method"], row["alphabets"]) == (method, n)], dtype=torch.float64)
    return float(values.mean()), float(deviation(values))


def ranked(rows: list[Row], n: int, key: str) -> list[tuple[str, float]]:
    """Methods and means over seeds, smallest first."""
    return sorted(((method, over_seeds(rows, method, n, key)[0]) for method in METHODS), key=lambda pair: pair[1])


def metrics(rows: list[Row], n: int) -> dict[str, dict[str, float]]:
    """The areas that the methods are ranked by after meta-training on n alphabets, means over seeds."""
    return {
        key: {method: round(over_seeds(rows, method, n, key)[0], 4) for method in METHODS}
        for key in ("auc_loss", "auc_held_out_error")
    }
