"""How far MAML's and implicit MAML's meta-gradients are from the exact one, where that is known."""

import math
import time
from collections.abc import Callable
from statistics import linear_regression
from typing import Annotated, NamedTuple

import torch
import typer
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from metalib.randomness import generator
from metalib.studies import regression
from metalib.studies.regression import Method, Point
from stages import params, study, tables
from stages.command import one_sentence

app = typer.Typer(add_completion=False)
NAME = "meta_gradient_error"
CONVERGED = 1e-13  # an error in double precision that falls no further
Kappa = Annotated[float, Field(gt=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Kind:
    """The study's numbers."""

    seed: int = Field(ge=0)
    tasks: PositiveInt
    size: int = Field(ge=2)  # weights, and images of a task
    lam: PositiveFloat
    inner_steps: int = Field(ge=10)  # the most
    points: int = Field(ge=5)  # of a curve, log-spaced
    kappa: Kappa  # of the figure's curves
    backprop_steps: list[PositiveInt] = Field(min_length=1)
    cg_steps: list[PositiveInt] = Field(min_length=1)
    kappas: list[Kappa] = Field(min_length=2)  # of the table
    target: float = Field(gt=1e-12, lt=1)
    fit: tuple[PositiveFloat, PositiveFloat]  # errors that the rates are fitted to


class Row(NamedTuple):
    """A row of the table: a way of going on until the meta-gradient is exact."""

    name: str
    slide: str  # the compute it has on the slide
    step: str  # what a step is
    methods: Callable[[int, float], Method]  # of steps and kappa
    decay: Callable[[float], float]  # by theory, in each step


ROWS = [
    Row("MAML, gradient descent", "kappa log(D/delta)", "inner step",
        lambda k, _: Method("maml", "gd", k, k), lambda kappa: 1 - 1 / kappa),
    Row("MAML, Nesterov's descent", "sqrt(kappa) log(D/delta)", "inner step",
        lambda k, _: Method("maml", "nesterov", k, k), lambda kappa: 1 - kappa**-0.5),
    Row("truncated MAML, half the steps", "kappa log(D/delta)", "differentiated step",
        lambda k, _: Method("maml", "gd", 2 * k, k), lambda kappa: 1 - 1 / kappa),
    Row("iMAML, gradient descent, as many CG steps", "-", "inner step",
        lambda k, _: Method("imaml", "gd", k, k), lambda kappa: 1 - 1 / kappa),
    Row("iMAML, Nesterov's descent, as many CG steps", "sqrt(kappa) log(D/delta)", "inner step",
        lambda k, _: Method("imaml", "nesterov", k, k), lambda kappa: 1 - kappa**-0.5),
    Row("iMAML, CG alone, at the solution", "-", "CG step",
        lambda k, kappa: Method("imaml", "nesterov", round(40 * kappa**0.5), k),
        lambda kappa: (kappa**0.5 - 1) / (kappa**0.5 + 1)),
]  # fmt: skip
IN_FULL = ROWS[:5]  # those that pay for all they do


@app.command()
@one_sentence
def main() -> None:
    """Write the study meta_gradient_error: figure, page, curves, metrics. In double precision, on the CPU."""
    began = time.monotonic()
    file = params.read()
    kind = params.study(file, NAME, Kind)
    budget = file.studies[NAME].budget
    steps = sorted({round(kind.inner_steps ** (i / (kind.points - 1))) for i in range(kind.points)})

    def problem(kappa: float) -> regression.Problem:
        random = generator(kind.seed, NAME)
        return regression.problem(kappa=kappa, lam=kind.lam, tasks=kind.tasks, size=kind.size, random=random)

    curves = {label: regression.sweep(methods, problem(kind.kappa), steps, CONVERGED) for label, methods in shown(kind).items()}
    fits = dict[tuple[str, float], tuple[float, float | None]]()
    for kappa in sorted(kind.kappas):
        for row in ROWS:
            points = regression.sweep(lambda k, row=row, kappa=kappa: row.methods(k, kappa), problem(kappa), steps, kind.fit[0])  # type: ignore[misc]
            try:
                cost = regression.products_to(points, kind.target) if row in IN_FULL else None
                fits[row.name, kappa] = regression.decay(points, kind.fit), cost
            except ValueError as error:
                raise ValueError(
                    f"studies.{NAME}.{budget}: {row.name}, kappa {kappa:g}: {error}; raise inner_steps or points, or widen fit"
                ) from None
    exponents = {
        row.name: linear_regression(
            [math.log(kappa) for kappa in sorted(kind.kappas)],
            [math.log(fits[row.name, kappa][1] or math.nan) for kappa in sorted(kind.kappas)],
        ).slope
        for row in IN_FULL
    }
    study.write(
        NAME,
        figure=draw(kind, curves, fits, exponents),
        report=report(kind, budget, curves, fits, exponents),
        data={
            "curves": [
                {"method": label, "inner_steps": p.steps, "products": p.products, "error": f"{p.error:.6g}"}
                for label, points in curves.items()
                for p in points
            ],
            "rates": [
                {
                    "method": row.name, "kappa": kappa, "decay": f"{fits[row.name, kappa][0]:.6g}",
                    "theory": f"{row.decay(kappa):.6g}",
                    "products": "" if (cost := fits[row.name, kappa][1]) is None else f"{cost:.6g}",
                }
                for kappa in sorted(kind.kappas)
                for row in ROWS
            ],
        },
        metrics={
            "error": {label: float(f"{points[-1].error:.3g}") for label, points in curves.items()},
            "exponent": {name: round(value, 3) for name, value in exponents.items()},
            "budget": budget,
        },
        where=torch.device("cpu"),
        began=began,
    )  # fmt: skip


def shown(kind: Kind) -> dict[str, Callable[[int], Method]]:
    """The figure's curves, methods by numbers of inner steps."""
    found: dict[str, Callable[[int], Method]] = {
        "MAML, gradient descent": lambda k: Method("maml", "gd", k, k),
        "MAML, Nesterov": lambda k: Method("maml", "nesterov", k, k),
    }
    for limit in kind.backprop_steps:
        found[f"truncated MAML, last {limit}"] = lambda k, limit=limit: Method("maml", "gd", k, limit)  # type: ignore[misc]
    for limit in kind.cg_steps:
        found[f"iMAML, CG {limit}"] = lambda k, limit=limit: Method("imaml", "nesterov", k, limit)  # type: ignore[misc]
    return found | {"iMAML, CG as inner steps": lambda k: Method("imaml", "nesterov", k, k)}


def draw(
    kind: Kind,
    curves: dict[str, list[Point]],
    fits: dict[tuple[str, float], tuple[float, float | None]],
    exponents: dict[str, float],
) -> Figure:
    """Error against inner steps and against products; products against the condition number."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    families = {"MAML": (0, "-"), "truncated": (1, "--"), "iMAML": (2, "-")}
    markers = iter("osv^D<>phX*")
    for label, points in curves.items():
        colour, line = families[label.split()[0].rstrip(",")]
        style = {"color": study.COLOURS[colour], "linestyle": line, "marker": next(markers), "markersize": 4, "linewidth": 1.2}
        drawn = [p for p in points if p.error > CONVERGED]
        left.plot([p.steps for p in drawn], [p.error for p in drawn], label=label, **style)
        middle.plot([p.products for p in drawn], [p.error for p in drawn], **style)
    for axis, what in ((left, "inner steps"), (middle, "gradients and Hessian-vector products")):
        axis.set(xscale="log", yscale="log", ylim=(1e-9, 10), xlabel=what, title=f"condition number {kind.kappa:g}")
    left.set(ylabel="relative error of the meta-gradient")
    kappas = sorted(kind.kappas)
    looks = [(0, "-", "o"), (0, "--", "s"), (1, "-", "v"), (2, "-", "^"), (2, "--", "D")]
    for row, (colour, line, marker) in zip(IN_FULL, looks, strict=True):
        label = f"{row.name.removesuffix(', as many CG steps')}: slope {exponents[row.name]:.2f}"
        costs = [fits[row.name, kappa][1] or math.nan for kappa in kappas]
        right.plot(kappas, costs, color=study.COLOURS[colour], linestyle=line, marker=marker, markersize=4, label=label)
    least = min(fits[IN_FULL[-1].name, kappa][1] or math.nan for kappa in kappas)
    right.set(
        xscale="log", yscale="log", ylim=(least / 12, None), xlabel="condition number of the inner problem",
        ylabel="gradients and Hessian-vector products", title=f"until the error is {kind.target:g}",
    )  # fmt: skip
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    right.legend(loc="lower right", fontsize="small", frameon=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    return figure


def report(
    kind: Kind,
    budget: str,
    curves: dict[str, list[Point]],
    fits: dict[tuple[str, float], tuple[float, float | None]],
    exponents: dict[str, float],
) -> str:
    """The study's page."""
    kappas = sorted(kind.kappas)
    floors = [[label, f"{points[-1].error:.2g}", str(points[-1].steps)] for label, points in curves.items()]
    rates = [
        [row.name, row.step, *(f"{fits[row.name, kappa][0]:.4f} ({row.decay(kappa):.4f})" for kappa in kappas)] for row in ROWS
    ]
    costs = [
        [row.name, row.slide, *(f"{fits[row.name, kappa][1]:.0f}" for kappa in kappas), f"{exponents[row.name]:.2f}"]
        for row in IN_FULL
    ]
    heads = [f"kappa {kappa:g}" for kappa in kappas]
    return "\n\n".join([
        "# The meta-gradient's error",
        "Slide \"Complexity\" (iMAML), the figure's left half and the table; Rajeswaran et al. 2019, table 1 and figure 2 "
        "([arXiv 1909.04630](https://arxiv.org/abs/1909.04630)). Regularised linear regression, whose meta-gradient is known "
        "in closed form: how far the computed one is from it, against inner steps, and against what they cost.",
        f"Budget {budget}: {kind.tasks} random tasks of {kind.size} weights and {kind.size} images, lam {kind.lam:g}, seed "
        f"{kind.seed}, double precision. Error: ||g - g*|| / ||g*||, geometric mean over tasks. All methods descend on the "
        "same proximal problem from theta at the rate 1/(kappa lam); kappa is its condition number, the eigenvalues of its "
        "Hessian are log-spaced. Cost: gradients of the support loss and Hessian-vector products with it, one each. iMAML and "
        "MAML (gradient descent) are the project's own learners, iMAML without dampings; its curves are of Nesterov's descent.",
        f"![Error of the meta-gradient against inner steps and against products]({NAME}.png)",
        "## Where the curves end",
        tables.markdown([f"method, kappa {kind.kappa:g}", "error", "inner steps"], floors),
        "Truncation and few CG steps leave an error that further inner steps do not mend.",
        "## The slide's table, measured",
        f"The factor the error falls by in each step, fitted to errors from {kind.fit[1]:g} to {kind.fit[0]:g}; in brackets "
        "the theory: 1 - 1/kappa for gradient descent, 1 - 1/sqrt(kappa) for Nesterov's, and for conjugate gradient the bound "
        "(sqrt(kappa) - 1)/(sqrt(kappa) + 1), which it may undercut. Descent is a little faster than theory: along the axis of "
        "H's smallest eigenvalue, 0, theta is right from the start, so the slowest error is along the next one.",
        tables.markdown(["method", "step", *heads], rates),
        f"Products until the error is {kind.target:g}, and the slope of their logarithm over that of kappa: 1 for kappa, 0.5 "
        "for sqrt(kappa).",
        tables.markdown(["method", "compute on the slide", *heads, "slope"], costs),
        "## What differs from the publication",
        "The authors publish neither data nor code of their example; size, spectrum and number of tasks are ours. The slide's "
        "errors of MAML compare with the algorithm's own derivative, after finitely many steps, and are 0 by definition; here "
        "all are compared with the exact solution's.",
    ])  # fmt: skip


if __name__ == "__main__":
    app()
