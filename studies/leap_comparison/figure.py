"""The study's figure, from the rows of its tables."""

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from stages import palette
from studies.leap_comparison.methods import METHODS
from studies.leap_comparison.schema import Comparison
from studies.leap_comparison.summary import TITLES, Row, over_seeds


def draw(asked: Comparison, areas: list[Row], training_batches: list[Row], held_out_images: list[Row]) -> Figure:
    """Left: learning curves after meta-training on the most alphabets. Right: areas under such curves against alphabets."""
    figure = Figure(figsize=(8.4, 6.2), layout="constrained")
    (above, above_right), (below, below_right) = figure.subplots(2, 2)
    most = asked.alphabets[-1]
    learners = {method: method for method in METHODS} | {"none": "scratch"}
    looks = palette.style(list(learners.values()))
    for method, learner in learners.items():
        look, bare = looks[learner], looks[learner] | {"marker": ""}
        mean, spread = (smooth(column(training_batches, method, most, n), asked.window) for n in ("loss", "loss_std"))
        band(above, torch.arange(len(mean)) + (asked.window - 1) / 2, mean, spread, bare)
        mean, spread = (100 * column(held_out_images, method, most, n) for n in ("error", "error_std"))
        band(below, asked.measure_every * torch.arange(len(mean)), mean, spread, bare)
        for axis, key, unit in ((above_right, "auc_loss", 1), (below_right, "auc_held_out_error", 100)):
            mean, spread = unit * torch.tensor([over_seeds(areas, method, n, key) for n in asked.alphabets]).T
            band(axis, torch.tensor(asked.alphabets), mean, spread, look | {"label": TITLES[method]})
    for axis, level in ((above, math.log(asked.way)), (below, 100 * (1 - 1 / asked.way))):
        guess = axis.axhline(level, color="grey", linewidth=1, linestyle=(0, (1, 1)), label="guessing", zorder=1)
    above.set_yscale("log")  # the first steps of some methods are many times higher than all the rest
    above.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    above.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    above.yaxis.set_minor_formatter(NullFormatter())
    above.set(title="Loss on training batches", ylabel="nats, log scale")
    below.set(title="Error on held-out images", ylabel="%", xlabel=f"inner steps ({alphabets(most)} in meta-training)")
    above_right.set(title="Area under the loss", ylabel="nats")
    below_right.set(title="Area under the error", ylabel="%", xlabel="alphabets in meta-training")
    for axis in (above_right, below_right):
        axis.set_xticks(asked.alphabets)
    for axis in (above, below, above_right, below_right):
        axis.grid(alpha=0.3)
    handles = [*above_right.get_legend_handles_labels()[0], guess]
    if len(asked.seeds) > 1:
        label = f"± 1 standard deviation over {len(asked.seeds)} seeds"
        handles.append(Patch(color="grey", alpha=0.3, linewidth=0, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def band(axis: Axes, x: Tensor, mean: Tensor, spread: Tensor, look: dict[str, Any]) -> None:
    """A curve, shaded by one standard deviation to either side."""
    axis.plot(x, mean, **look)
    axis.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)


def column(rows: list[Row], method: str, n: int, name: str) -> Tensor:
    """One curve of a table, (points,)."""
    return torch.tensor([row[name] for row in rows if (row["method"], row["alphabets"]) == (method, n)])


def smooth(values: Tensor, window: int) -> Tensor:
    """Moving average of a curve (points,): (points - window + 1,)."""
    return values.unfold(0, window, 1).mean(-1)


def alphabets(n: int) -> str:
    return f"{n} alphabet{'s' * (n > 1)}"
