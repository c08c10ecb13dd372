"""The study's figure: error against inner steps, error against cost, cost against the condition number."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages import palette
from studies.meta_gradient_error.curves import CONVERGED, CurvePoint, Rate, exponents
from studies.meta_gradient_error.schema import Values
from studies.room import spread

NAMES = {"MAML": "maml", "truncated MAML": "maml_truncated", "iMAML": "imaml"}
LEARNERS = {title: palette.style([name])[name] for title, name in NAMES.items()}
FIXED = "Nesterov's descent, a fixed number of CG steps"
DESCENTS: dict[str, Any] = {"gradient descent": "-", "Nesterov's descent": "--", FIXED: ":"}
COST = "gradients and Hessian-vector products"


def draw(values: Values, curves: Sequence[CurvePoint], rates: Sequence[Rate]) -> Figure:
    """The colour is the learner, the line style its descent; the rest is written beside the curves."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    lines: dict[str, list[CurvePoint]] = {}
    for point in curves:
        if point.error > CONVERGED:
            lines.setdefault(point.method, []).append(point)
    for name, points in lines.items():
        errors = [p.error for p in points]
        bare = _look(name) | {"marker": ""}
        left.plot([p.inner_steps for p in points], errors, **bare)
        middle.plot([p.products for p in points], errors, **bare)
    floors = {name: points[-1].error for name, points in lines.items() if name.startswith("truncated") or name.endswith("CG")}
    for (name, floor), y in zip(floors.items(), spread(list(floors.values()), 1.8, log=True), strict=True):
        label = name.partition(", ")[2]
        for axis, x in ((left, lines[name][-1].inner_steps), (middle, lines[name][-1].products)):
            axis.annotate(
                label, (x, floor), (1.25 * x, y), color=_look(name)["color"], fontsize="small", va="center",
                arrowprops={"arrowstyle": "-", "color": _look(name)["color"], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
    left.set(
        xlabel="inner steps",
        ylabel="relative error of the meta-gradient",
        title=f"error by steps, condition number {values.kappa:g}",
    )
    middle.set(xlabel=COST, title=f"error by cost, condition number {values.kappa:g}")
    for axis in (left, middle):
        axis.set(xscale="log", yscale="log", ylim=(1e-7, 10))
        axis.set_xlim(right=6 * values.inner_steps)
    right.set(xlabel="condition number of the inner problem", ylabel=COST, title=f"cost until the error is {values.target:g}")
    found = exponents(rates)
    costs = {name: [(r.kappa, r.products or math.nan) for r in rates if r.method == name] for name in found}
    for name, line in costs.items():
        right.plot(*zip(*line, strict=True), **_look(name))
    for name, y in zip(costs, spread([line[-1][1] for line in costs.values()], 1.13, log=True), strict=True):
        place = (1.05 * max(values.kappas), y)
        right.annotate(f"exponent {found[name]:.2f}", place, color=_look(name)["color"], fontsize="small", va="center")
    right.set(xscale="log", yscale="log")
    right.set_xlim(right=2.5 * max(values.kappas))
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    keys = [Line2D([], [], **(look | {"linestyle": "-"}), label=name) for name, look in LEARNERS.items()]
    keys += [Line2D([], [], color="black", linestyle=style, label=name) for name, style in DESCENTS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    return figure


def _look(method: str) -> dict[str, Any]:
    """How a method's curve is drawn: by its learner, and by its descent."""
    learner, _, rest = method.partition(", ")
    descent = FIXED if rest.endswith("CG") else "Nesterov's descent" if rest.startswith("Nesterov") else "gradient descent"
    return LEARNERS[learner] | {"linestyle": DESCENTS[descent], "markersize": 4, "linewidth": 1.2}
