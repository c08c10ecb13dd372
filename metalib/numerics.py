"""Linear solvers and line search, batched over tasks: every task has its own step length and stops by itself.

A task that is done or has failed is masked; nothing here reads a value on the host, so a GPU never waits.
Functions f map weights (T, *shape) to (T,), one number per task, and matvec maps weights to weights, A_t v_t for each task.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metalib import tree
from metalib.types import Params

Matvec = Callable[[Params], Params]
DECREASE = 1e-4  # Armijo's: the part of the decrease that the slope promises which a step must bring (Nocedal and Wright's)


def hessian(f: Callable[[Params], Tensor], at: Params) -> tuple[Tensor, Params, Matvec]:
    """f (T,), its gradient, and v -> H_t v, all at the weights `at` (T, *shape), without a graph to them.

    The Hessian-vector product is the gradient of <grad f, v> (Pearlmutter 1994); the graph of grad f is built once.
    """
    at = tree.detach(at)
    values = f(at)
    grads = tree.grad(values.sum(), at, create_graph=True)
    dependent = [name for name in at if grads[name].requires_grad]  # the others have second derivative 0

    def product(v: Params) -> Params:
        products = torch.autograd.grad(
            [grads[name] for name in dependent],
            list(at.values()),
            [v[name] for name in dependent],
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(at, products, strict=True))

    return values.detach(), {name: g.detach() for name, g in grads.items()}, product


def cg(matvec: Matvec, b: Params, steps: int) -> Params:
    """x with A x = b by conjugate gradient (Hestenes and Stiefel 1952), from x = 0; exact after as many steps as dimensions.

    A task stops for itself when its residual is zero to rounding, and where the curvature along its search direction is not
    positive: A is then no matrix CG can invert, and the best x so far stays (b itself when it is the first direction).
    """
    x, r, p = tree.scale(0.0, b), b, b
    rr = tree.dot(r, r)
    enough = rr * torch.finfo(rr.dtype).eps ** 2
    active = rr > 0
    for step in range(steps):
        ap = matvec(p)
        curvature = tree.dot(p, ap)
        positive = curvature > 0
        if step == 0:
            x = tree.where(positive, x, b)
        active = active & positive
        alpha = torch.where(active, rr / torch.where(active, curvature, 1), 0)
        x = tree.where(active, tree.axpy(alpha, p, x), x)
        r = tree.where(active, tree.axpy(-alpha, ap, r), r)
        after = tree.dot(r, r)
        p = tree.axpy(torch.where(active, after / torch.where(active, rr, 1), 0), p, r)
        rr, active = after, active & (after > enough)
    return x


def neumann(matvec: Matvec, b: Params, steps: int, rate: float) -> Params:
    """x with A x = b as the first steps + 1 terms of rate * sum_j (I - rate A)^j b; converges when 0 < rate A < 2.

    Lorraine, Vicol, Duvenaud 2020 (https://arxiv.org/abs/1911.02590), algorithm 3.
    """
    term = total = b
    for _ in range(steps):
        term = tree.axpy(-rate, matvec(term), term)
        total = tree.axpy(1.0, term, total)
    return tree.scale(rate, total)


def armijo(
    f: Callable[[Params], Tensor],
    at: Params,
    value: Tensor,
    slope: Tensor,
    direction: Params,
    lr: float,
    halvings: int,
) -> tuple[Params, Tensor]:
    """Backtracking line search (Armijo 1966; Nocedal and Wright, algorithm 3.1): the weights it ends at, and f there.

    Each task takes the first of the lengths lr, lr/2, ..., lr/2^halvings with f(at + length d) <= f(at) + DECREASE length
    slope, where value = f(at) and slope = <grad f, d> are (T,); a task for which none will do stays where it is.
    """
    found, best = at, value
    length = torch.full_like(value, lr)
    done = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(halvings + 1):
        trial = tree.axpy(length, direction, at)
        now = f(trial)
        good = ~done & now.isfinite() & (now <= value + DECREASE * length * slope)
        found, best = tree.where(good, trial, found), torch.where(good, now, best)
        done = done | good
        length = length / 2
    return found, best
