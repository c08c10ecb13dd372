"""Arithmetic on weights, Hessian-vector products, linear solvers and line search against values known otherwise, in float64.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

from itertools import pairwise

import pytest
import torch
from scipy.sparse.linalg import cg as scipy_cg
from torch import Tensor

from metalib import numerics, tree
from metalib.types import Params
from tests import problems


def split(v: Tensor) -> Params:
    """(T, d) as weights of two names and shapes, so that inner products must cross names."""
    return {"a": v[:, :2], "b": v[:, 2:].unflatten(1, (-1, 2))}


def join(v: Params) -> Tensor:
    return torch.cat([v["a"], v["b"].flatten(1)], 1)


def multiply(matrices: Tensor) -> numerics.Matvec:
    return lambda v: split(torch.einsum("tij,tj->ti", matrices, join(v)))


def vectors(tasks: int, size: int) -> Tensor:
    return torch.randn(tasks, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_arithmetic_per_task_by_hand() -> None:
    """As many tasks as columns, so that a factor laid along the wrong axis gives a number, a wrong one.

    x: (1, 2 | 5, 6) and (3, 4 | 7, 8),  y: (1, 0 | 1, 1) and (0, 1 | 2, 2).
    x . y = 1 + 0 + 5 + 6 = 12 and 0 + 4 + 14 + 16 = 34; 2x + y of the first and -x + y of the second task are
    (3, 4 | 11, 13) and (-3, -3 | -5, -6).

    Seen failing with _per_task viewing the factors as a row, with dot over the first name alone and over the tasks (sum(0)),
    and with where's weights exchanged.
    """
    x = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "k": torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]]])}
    y = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "k": torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])}
    a = torch.tensor([2.0, -1.0])

    def values(p: Params) -> list[list[float]]:
        return torch.cat([p["w"], p["k"].flatten(1)], 1).tolist()

    assert tree.dot(x, y).tolist() == [12, 34]
    assert values(tree.axpy(a, x, y)) == [[3, 4, 11, 13], [-3, -3, -5, -6]]
    assert values(tree.axpy(2.0, x, y)) == [[3, 4, 11, 13], [6, 9, 16, 18]]
    assert values(tree.scale(a, x)) == [[2, 4, 10, 12], [-3, -4, -7, -8]]
    assert values(tree.scale(2.0, x)) == [[2, 4, 10, 12], [6, 8, 14, 16]]
    assert values(tree.sub(x, y)) == [[0, 2, 4, 5], [3, 3, 5, 6]]
    assert values(tree.where(torch.tensor([True, False]), x, y)) == [[1, 2, 5, 6], [0, 1, 2, 2]]
    assert tree.mean_tasks(x)["w"].tolist() == [2, 3] and tree.mean_tasks(x)["k"].tolist() == [[6, 7]]


def smooth_point() -> tuple[object, Params, list[Params]]:
    """smooth_loss as a function of weights that differ from task to task, and directions that do."""
    params, batch = problems.smooth_problem()
    theta = tree.tile(params, 4)
    away, *rest = problems.directions(theta)
    return lambda p: problems.smooth_loss(p, batch.support_x, batch.support_y), tree.axpy(0.3, away, theta), rest


def test_hessian_against_central_differences() -> None:
    """f and its gradient along v, and H v against differences of gradients, for each task.

    The error of a central difference is O(step^2) + rounding / step, about 1e-9 here.

    Seen failing with one of the dependent weights left out of the product, with the directions of the tasks averaged, and
    with the products doubled.
    """
    f, at, directions = smooth_point()
    values, grads, product = numerics.hessian(f, at)
    torch.testing.assert_close(values, f(at), rtol=1e-14, atol=0)
    assert not values.requires_grad and not any(g.requires_grad for g in grads.values())

    def gradient(p: Params) -> Params:
        p = tree.detach(p)
        return tree.grad(f(p).sum(), p)

    step = 1e-5
    for v in directions:
        ahead, behind = tree.axpy(step, v, at), tree.axpy(-step, v, at)
        torch.testing.assert_close(tree.dot(grads, v), (f(ahead) - f(behind)) / (2 * step), rtol=1e-7, atol=1e-9)
        curved = product(v)
        for name, g in tree.sub(gradient(ahead), gradient(behind)).items():
            assert not curved[name].requires_grad
            torch.testing.assert_close(curved[name], g / (2 * step), rtol=1e-6, atol=1e-8)


def test_hessian_is_symmetric_linear_and_repeats() -> None:
    """u' H v = v' H u for each task, to rounding; H (u + 2 v) = H u + 2 H v; the same product twice.

    Seen failing with one of the dependent weights left out of the product (symmetry), and with the direction's values
    squared (linearity).
    """
    f, at, (u, v, *_) = smooth_point()
    _, _, product = numerics.hessian(f, at)
    hu, hv = product(u), product(v)
    assert tree.dot(u, hv).abs().min() > 1e-3
    torch.testing.assert_close(tree.dot(u, hv), tree.dot(v, hu), rtol=1e-11, atol=0)
    for name, value in product(tree.axpy(2.0, v, u)).items():
        torch.testing.assert_close(value, hu[name] + 2 * hv[name], rtol=1e-10, atol=1e-12)
        assert torch.equal(product(v)[name], hv[name])


def test_hessian_where_the_function_is_linear_or_constant() -> None:
    """f = a^2 b + 3 c and no d, at a = 2, b = 5, v = (1, 1, 1, 1): H v = (2 b + 2 a, 2 a, 0, 0) = (14, 4, 0, 0).

    Of a task with v = 0 it is 0. And H = 0 where nothing is curved: f = 3 c.

    Seen failing with the products taken of all weights, dependent or not.
    """
    at = {
        name: torch.full((2, 1), value, dtype=torch.float64) for name, value in zip("abcd", (2.0, 5.0, 1.0, 1.0), strict=True)
    }
    v = {name: torch.tensor([[1.0], [0.0]], dtype=torch.float64) for name in at}
    values, grads, product = numerics.hessian(lambda p: (p["a"] ** 2 * p["b"] + 3 * p["c"]).sum(1), at)
    assert values.tolist() == [23, 23]
    assert {name: g[0].item() for name, g in grads.items()} == {"a": 20, "b": 4, "c": 3, "d": 0}
    assert {name: h.flatten().tolist() for name, h in product(v).items()} == {
        "a": [14, 0],
        "b": [4, 0],
        "c": [0, 0],
        "d": [0, 0],
    }
    _, grads, product = numerics.hessian(lambda p: 3 * p["c"].sum(1), at)
    assert grads["c"].tolist() == [[3], [3]]
    assert all(h.tolist() == [[0], [0]] for h in product(v).values())


def test_cg_is_exact_after_as_many_steps_as_dimensions() -> None:
    """Against a dense solve, conditioning 1, 10, 100 side by side; ten times the steps change nothing.

    Seen failing with a step length or beta shared by the tasks (their mean), with beta upside down, and with one step fewer.
    """
    a, b = problems.spd([1.0, 10.0, 100.0], 6), vectors(3, 6)
    exact = torch.linalg.solve(a, b)
    for steps in (6, 60):
        torch.testing.assert_close(join(numerics.cg(multiply(a), split(b), steps)), exact, rtol=1e-9, atol=1e-12)
    assert (join(numerics.cg(multiply(a), split(b), 5)) - exact)[1:].norm(dim=1).min() > 1e-6


def test_cg_error_falls_as_theory_says() -> None:
    """||x_j - x||_A <= 2 ((sqrt k - 1) / (sqrt k + 1))^j ||x||_A, k the condition number, and it never grows.

    Seen failing with p = r in place of the conjugate direction (steepest descent), and with x = b in every first step.
    """
    conditions = [2.0, 20.0, 200.0]
    a, b = problems.spd(conditions, 40), vectors(3, 40)
    exact = torch.linalg.solve(a, b)
    root = torch.tensor(conditions, dtype=torch.float64).sqrt()
    errors = []
    for j in range(0, 25, 3):
        away = join(numerics.cg(multiply(a), split(b), j)) - exact
        errors.append(torch.einsum("ti,tij,tj->t", away, a, away).sqrt())
        assert (errors[-1] <= 2 * ((root - 1) / (root + 1)) ** j * errors[0] + 1e-12).all()
    for before, after in pairwise(errors):
        assert ((after < before) | (after < 1e-12)).all()


def test_cg_goes_through_the_iterates_of_scipy() -> None:
    """x_1, x_2, ... of every task against scipy.sparse.linalg.cg's of the task alone.

    Seen failing with the residual one step old in beta, and with the start x = b.
    """
    a, b = problems.spd([3.0, 30.0, 300.0], 8), vectors(3, 8)
    for t in range(3):
        iterates: list[Tensor] = []
        scipy_cg(
            a[t].numpy(), b[t].numpy(), rtol=0, atol=1e-10, maxiter=8,
            callback=lambda x: iterates.append(torch.from_numpy(x.copy())),  # noqa: B023
        )  # fmt: skip
        assert len(iterates) == 8
        for j, expected in enumerate(iterates, 1):
            torch.testing.assert_close(join(numerics.cg(multiply(a), split(b), j))[t], expected, rtol=1e-8, atol=1e-11)


FATES = {  # A, b, x
    "healthy": ([[4, 1], [1, 3]], [1, 2], [1 / 11, 7 / 11]),
    "nothing to do": ([[4, 1], [1, 3]], [0, 0], [0, 0]),
    "eigenvector": ([[2, 0], [0, 5]], [0, 5], [0, 1]),
    "negative at once": ([[1, 0], [0, -2]], [1, 1], [1, 1]),
    "negative later": ([[4, 0], [0, -1]], [1, 1], [2 / 3, 2 / 3]),
    "flat": ([[0, 0], [0, 0]], [1, 2], [1, 2]),
    "not a number": ([[torch.nan, 0], [0, 1]], [1, 2], [1, 2]),
    "infinite": ([[torch.inf, 0], [0, 1]], [1, 2], [0, 0]),
}


@pytest.mark.parametrize("steps", [2, 20])
def test_cg_stops_each_task_for_itself(steps: int) -> None:
    """Tasks that end early beside a healthy one; how many steps follow makes no difference to them.

    Healthy: A = (4 1; 1 3), b = (1, 2), x = (3 - 2, -1 + 8) / 11.   An eigenvector: one step, exactly (0, 5 / 5).
    A = diag(1, -2), b = (1, 1): b' A b = -1, b itself stays.   A = diag(4, -1), b = (1, 1): curvature 3, length 2/3, x = 2/3 b,
    r = (1 - 8/3, 1 + 2/3) = 5/3 (-1, 1), beta = (50/9) / 2 = 25/9, p = (-15 + 25, 15 + 25) / 9 = (10, 40) / 9 with
    p' A p = (400 - 1600) / 81 < 0: x stays 2/3 b.   Curvature 0 or no number: b.   Infinite curvature: a step of length 0.

    The matvec is shown finite vectors alone, but for the two last tasks.

    Seen failing with tasks active for ever or in spite of their curvature, with x and the step length unmasked, without
    `x = b`, with a whole batch stopped by one task (active.all()), and (vectors shown) with beta unguarded, 0 / 0.
    """
    a, b, expected = (torch.tensor(part, dtype=torch.float64) for part in zip(*FATES.values(), strict=True))

    shown: list[Tensor] = []

    def solve(matrices: Tensor, right: Tensor) -> Tensor:
        def product(v: Params) -> Params:
            shown.append(v["w"])
            return {"w": torch.einsum("tij,tj->ti", matrices, v["w"])}

        return numerics.cg(product, {"w": right}, steps)["w"]

    x = solve(a, b)
    torch.testing.assert_close(x, expected, rtol=1e-14, atol=0)
    assert len(shown) == steps and all(v[:-2].isfinite().all() for v in shown)
    assert torch.equal(x[1:4], expected[1:4])
    healthy = solve(a[:1].expand_as(a).clone(), b[:1].expand_as(b).clone())
    assert torch.equal(x[0], healthy[0])


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_neumann_is_the_partial_sum(steps: int) -> None:
    """rate sum_{j <= steps} (I - rate A)^j b = (I - (I - rate A)^{steps + 1}) A^-1 b, for each task.

    Seen failing with `rate` left out of the last line or of the terms, and with the sum started from 0.
    """
    a, b = problems.spd([2.0, 5.0, 10.0], 6), vectors(3, 6)
    rest = torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - 0.15 * a, steps + 1)
    exact = torch.linalg.solve(a, b)
    expected = exact - torch.einsum("tij,tj->ti", rest, exact)
    torch.testing.assert_close(join(numerics.neumann(multiply(a), split(b), steps, 0.15)), expected, rtol=1e-11, atol=1e-13)


def test_neumann_and_cg_agree_on_the_solution() -> None:
    """At rate 2 / (1 + 10) the terms shrink by 9/11 each: (9/11)^150 = 1e-13.

    Seen failing with `rate` left out of the last line (neumann), and with beta upside down (cg).
    """
    a, b = problems.spd([2.0, 5.0, 10.0], 6), vectors(3, 6)
    series = join(numerics.neumann(multiply(a), split(b), 150, 2 / 11))
    torch.testing.assert_close(series, torch.linalg.solve(a, b), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(series, join(numerics.cg(multiply(a), split(b), 6)), rtol=1e-10, atol=1e-11)


def bowl(c: Tensor) -> object:
    """f(w) = c w^2 / 2 of each task."""
    return lambda p: 0.5 * c * p["w"][:, 0] ** 2


@pytest.mark.parametrize(("lr", "halvings", "decrease", "expected"), [
    (1.0, 2, 1e-4, [0, 0, -0.5, -0.75, 1]),
    (1.0, 0, 1e-4, [0, 1, 1, 1, 1]),
    (1.0, 4, 1e-4, [0, 0, -0.5, -0.75, 0]),
    (1.0, 2, 0.5, [0, 0, 0.25, 1, 1]),
    (2.0, 2, 1e-4, [0, 0, -0.5, 1, 1]),
])  # fmt: skip
def test_armijo_by_hand(
    lr: float, halvings: int, decrease: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """f = c w^2 / 2 from w = 1 down the gradient, d = -c, slope -c^2: a length l leads to w = 1 - l c and is taken when

        c (1 - l c)^2 / 2 <= c / 2 - decrease l c^2,    that is    l c <= 2 (1 - decrease).

    c = 1, 2, 3, 7, 16; lengths 1, 1/2, 1/4 and decrease 1e-4: l c = 1; 2 is too far, 1; 3/2; 7/4; 4 is too far, stays.
    With decrease 1/2, l c <= 1: 1; 1; 3/4; 7/4 and 4 are too far.  From length 2: 2 is too far, 1; 1; 3/2; 7/2 and 8 too far.

    Seen failing with the slope left out (c = 2 takes length 1), with one halving fewer, with lengths cut to a quarter, with
    one length for all tasks (good.all()), and without ~done.
    """
    monkeypatch.setattr(numerics, "DECREASE", decrease)
    c = torch.tensor([1.0, 2.0, 3.0, 7.0, 16.0], dtype=torch.float64)
    at = {"w": torch.ones(5, 1, dtype=torch.float64)}
    f = bowl(c)
    found, value = numerics.armijo(f, at, f(at), -c * c, {"w": -c[:, None]}, lr, halvings)
    assert found["w"].flatten().tolist() == expected
    assert torch.equal(value, f(found))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_armijo_never_takes_a_value_that_is_not_finite(bad: float) -> None:
    """The bowl of curvature 3 above, f = `bad` at w < 0: length 1/2 (w = -1/2) is out, 1/4 leads to w = 1/4, f = 3/32.

    Where f is `bad` everywhere but at w = 1 the task stays, and where it is so at w = 1, too; the neighbour steps as ever.

    Seen failing with `isfinite` forgotten (-inf), and with the test turned round, ~(now > ...) (nan).
    """
    c = torch.tensor([3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    at = {"w": torch.ones(4, 1, dtype=torch.float64)}

    def f(p: Params) -> Tensor:
        w = p["w"][:, 0]
        everywhere = torch.tensor(True)
        return torch.where(torch.stack([w[0] < 0, w[1] != 1, everywhere, ~everywhere]), bad, 0.5 * c * w**2)

    found, value = numerics.armijo(f, at, f(at), -c * c, {"w": -c[:, None]}, 1.0, 3)
    assert found["w"].flatten().tolist() == [0.25, 1, 1, -0.5]
    assert value[[0, 1, 3]].tolist() == [3 / 32, 1.5, 3 / 8]


def test_armijo_returns_the_value_at_its_weights() -> None:
    """On smooth_loss, uphill in one task, which stays bit for bit; in the others the loss falls enough.

    Seen failing with the last trial's values returned, and with the value at the start.
    """
    f, at, _ = smooth_point()
    value, grads, _ = numerics.hessian(f, at)
    sign = torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    direction = tree.scale(sign, grads)
    slope = -tree.dot(grads, grads)  # of the three that go down
    found, best = numerics.armijo(f, at, value, slope, direction, 64.0, 8)
    torch.testing.assert_close(best, f(found), rtol=1e-14, atol=0)
    assert (best <= value).tolist() == [True] * 4 and (best < value).tolist() == [True, False, True, True]
    assert all(torch.equal(found[name][1], at[name][1]) for name in at)
