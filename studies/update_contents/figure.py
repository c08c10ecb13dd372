"""The study's figure: the two coefficients against k, and the learning curves of the combinations."""

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages import palette
from studies.room import spread
from studies.update_contents.combinations import COMBINATIONS, Measured
from studies.update_contents.expansions import EXPECTED, Row

LABELS = {"maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}
LEARNERS: dict[str, dict[str, Any]] = palette.style(list(LABELS))
COUNTS = {count: colormaps["viridis"](0.24 * (count - 1)) for count in (1, 2, 3, 4)}  # of gradients in a combination
ALPHAS: list[dict[str, Any]] = [  # measured values, the smallest alpha first; lines alone are the slide's
    {"linestyle": "none"},
    {"linestyle": "--", "markerfacecolor": "none", "linewidth": 0.8},
    {"linestyle": ":", "markerfacecolor": "none", "linewidth": 0.8},
]


def draw(rows: Sequence[Row], curves: Sequence[Measured]) -> Figure:
    """Coefficients: a colour is a learner. Combinations: a colour is a number of gradients, a line style how they add up."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    ks = sorted({row.k for row in rows})
    alphas = sorted({row.alpha for row in rows})
    for i, name in enumerate(LABELS):
        look = LEARNERS[name]
        for axis, which in ((left, 0), (middle, 1)):
            expected = [EXPECTED[name](k)[which] for k in ks]
            axis.plot(ks, expected, color=look["color"], linewidth=3.5 - i, alpha=0.5)  # thinner on top where two coincide
        for j, alpha in enumerate(alphas):
            shown = [row for row in rows if (row.learner, row.alpha) == (name, alpha)]
            x = [row.k + 0.08 * (i - 1) for row in shown]  # side by side
            style = look | {"markersize": 5, "capsize": 2} | ALPHAS[min(j, len(ALPHAS) - 1)]
            left.errorbar(x, [row.average for row in shown], [row.average_error for row in shown], **style)
            middle.errorbar(x, [row.inner for row in shown], [row.inner_error for row in shown], **style)
    left.set(title="multiple of AvgGrad", ylabel="coefficient")
    middle.set(title="multiple of -alpha AvgGradInner")
    for axis in (left, middle):
        axis.set(xlabel="gradients k", xticks=ks)
    last: dict[str, Measured] = {}
    for name, weights in COMBINATIONS.items():
        points = [m for m in curves if m.combination == name]
        colour = COUNTS[len(weights)]
        line = "-" if weights[0] == 1 else ":" if weights[0] == 0 else "--"
        right.plot([m.step for m in points], [100 * m.accuracy for m in points], color=colour, linestyle=line, marker=".")
        last[name] = points[-1]
    bottom, top = right.get_ylim()
    places = spread([100 * m.accuracy for m in last.values()], 0.045 * (top - bottom))
    for (name, point), y in zip(last.items(), places, strict=True):
        colour = COUNTS[len(COMBINATIONS[name])]
        right.annotate(
            name, (point.step, 100 * point.accuracy), (1.04 * point.step, y), color=colour, fontsize="small", va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    right.set(title="outer steps along combinations of gradients", xlabel="meta-steps", ylabel="validation accuracy, %")
    end = max(point.step for point in last.values())
    right.set(xlim=(0, 1.4 * end), xticks=[tick for tick in right.get_xticks() if 0 <= tick <= end])
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    keys = [Line2D([], [], **LEARNERS[name] | {"linestyle": "-"}, label=label) for name, label in LABELS.items()]
    keys.append(Line2D([], [], color="grey", linewidth=2, label="the slide's"))
    for style, alpha in zip(ALPHAS, alphas, strict=False):
        keys.append(Line2D([], [], color="grey", marker="o", **style, label=f"measured, alpha = {alpha:g}"))
    figure.legend(handles=keys, loc="outside lower left", ncols=3, fontsize="small", frameon=False)
    adding: dict[str, Any] = {"sum": "-", "mean": "--", "last gradient alone": ":"}
    keys = [Line2D([], [], color="grey", linestyle=line, label=name) for name, line in adding.items()]
    keys += [Line2D([], [], color=colour, label=f"{count} gradient{'s' * (count > 1)}") for count, colour in COUNTS.items()]
    figure.legend(handles=keys, loc="outside lower right", ncols=4, fontsize="small", frameon=False)
    return figure
