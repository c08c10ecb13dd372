"""Curves of the meta-gradient's error, and the rates and costs of the slide's table that are read off them."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import linear_regression
from typing import NamedTuple

from metalib.randomness import generator
from studies.meta_gradient_error.regression import Method, Problem, error, problem
from studies.meta_gradient_error.schema import Values

CONVERGED = 1e-13  # where rounding ends a curve


class Point(NamedTuple):
    """A method's error and cost after so many steps; what a step is, the method says."""

    steps: int
    products: int  # gradients and Hessian-vector products
    error: float


class CurvePoint(NamedTuple):
    """A row of curves.csv."""

    method: str
    inner_steps: int
    products: int
    error: float


class Rate(NamedTuple):
    """A row of rates.csv."""

    method: str
    kappa: float
    decay: float  # measured: what a step multiplies the error by
    theory: float  # the same, by theory
    products: float | None  # until the error is `target`; None for a method that starts from a given solution


class Line(NamedTuple):
    """A line of the slide's table: a method that becomes exact as its steps go on."""

    name: str
    slide: str  # its compute on the slide
    step: str  # what a step is
    method: Callable[[int, float], Method]  # of steps and kappa
    theory: Callable[[float], float]  # of kappa: what a step multiplies the error by


LINES = [
    Line("MAML, gradient descent", "kappa log(D/delta)", "inner step",
         lambda k, _: Method("maml", "gd", k, k), lambda kappa: 1 - 1 / kappa),
    Line("MAML, Nesterov", "sqrt(kappa) log(D/delta)", "inner step",
         lambda k, _: Method("maml", "nesterov", k, k), lambda kappa: 1 - kappa**-0.5),
    Line("truncated MAML, last half", "kappa log(D/delta)", "differentiated step",
         lambda k, _: Method("maml", "gd", 2 * k, k), lambda kappa: 1 - 1 / kappa),
    Line("iMAML, gradient descent", "-", "inner step",
         lambda k, _: Method("imaml", "gd", k, k), lambda kappa: 1 - 1 / kappa),
    Line("iMAML, Nesterov", "sqrt(kappa) log(D/delta)", "inner step",
         lambda k, _: Method("imaml", "nesterov", k, k), lambda kappa: 1 - kappa**-0.5),
    Line("iMAML, CG at the solution", "-", "CG step",
         lambda k, kappa: Method("imaml", "nesterov", round(40 * kappa**0.5), k),
         lambda kappa: (kappa**0.5 - 1) / (kappa**0.5 + 1)),
]  # fmt: skip
COSTED = LINES[:5]  # the last one is not charged for the solution it starts from


def shown(values: Values) -> dict[str, Callable[[int], Method]]:
    """The figure's curves: name -> (inner steps -> method). Fixed numbers of CG steps go with Nesterov's descent."""
    found: dict[str, Callable[[int], Method]] = {
        "MAML, gradient descent": lambda k: Method("maml", "gd", k, k),
        "MAML, Nesterov": lambda k: Method("maml", "nesterov", k, k),
    }
    for limit in values.backprop_steps:
        found[f"truncated MAML, last {limit}"] = lambda k, limit=limit: Method("maml", "gd", k, limit)  # type: ignore[misc]
    for limit in values.cg_steps:
        found[f"iMAML, {limit} CG"] = lambda k, limit=limit: Method("imaml", "nesterov", k, limit)  # type: ignore[misc]
    return found | {"iMAML, Nesterov": lambda k: Method("imaml", "nesterov", k, k)}


def curves(values: Values) -> list[CurvePoint]:
    """Every shown method's error at values.kappa, against its inner steps and its products."""
    return [
        CurvePoint(name, *point)
        for name, method in shown(values).items()
        for point in sweep(method, _problem(values, values.kappa), _steps(values), CONVERGED)
    ]


def rates(values: Values) -> list[Rate]:
    """Every line of the table at every kappa. ValueError where a curve does not reach far enough for it."""
    found = []
    for kappa in sorted(values.kappas):
        on = _problem(values, kappa)
        for line in LINES:
            points = sweep(lambda k, line=line, kappa=kappa: line.method(k, kappa), on, _steps(values), values.fit[0])  # type: ignore[misc]
            try:
                cost = products_to(points, values.target) if line in COSTED else None
                found.append(Rate(line.name, kappa, decay(points, values.fit), line.theory(kappa), cost))
            except ValueError as error:
                raise ValueError(f"{line.name}, kappa {kappa:g}: {error}; raise inner_steps or points, or widen fit") from None
    return found


def exponents(rates: Sequence[Rate]) -> dict[str, float]:
    """Method -> the exponent of kappa in its cost, by least squares on log-log axes: 1 for kappa, 0.5 for sqrt(kappa)."""
    costs: dict[str, list[tuple[float, float]]] = {}
    for rate in rates:
        if rate.products is not None:
            costs.setdefault(rate.method, []).append((math.log(rate.kappa), math.log(rate.products)))
    return {name: linear_regression(*zip(*pairs, strict=True)).slope for name, pairs in costs.items()}


def _problem(values: Values, kappa: float) -> Problem:
    random = generator(values.seed, "meta_gradient_error")
    return problem(kappa=kappa, lam=values.lam, tasks=values.tasks, size=values.size, random=random)


def _steps(values: Values) -> list[int]:
    return sorted({round(values.inner_steps ** (i / (values.points - 1))) for i in range(values.points)})


def sweep(method: Callable[[int], Method], on: Problem, steps: Sequence[int], least: float) -> list[Point]:
    """method(k) for every k of `steps`, up to the first whose error is below `least`."""
    points = list[Point]()
    for k in steps:
        chosen = method(k)
        points.append(Point(k, chosen.products, error(chosen, on)))
        if points[-1].error < least:
            break
    return points


def decay(points: Sequence[Point], between: tuple[float, float]) -> float:
    """What a step multiplies the error by: least squares on the logarithms of the errors between the two bounds.

    ValueError where fewer than two lie there.
    """
    chosen = [point for point in points if between[0] <= point.error <= between[1]]
    if len(chosen) < 2:
        raise ValueError(f"fewer than two of the errors lie between {between[0]:g} and {between[1]:g}")
    return math.exp(linear_regression([p.steps for p in chosen], [math.log(p.error) for p in chosen]).slope)


def products_to(points: Sequence[Point], target: float) -> float:
    """Products until the error is `target`, log-linear between the points around it. ValueError where it stays above."""
    for before, after in pairwise(points):
        if after.error <= target < before.error:
            part = math.log(before.error / target) / math.log(before.error / after.error)
            return before.products + part * (after.products - before.products)
    raise ValueError(f"the error does not fall to {target:g} within {points[-1].steps} steps")
