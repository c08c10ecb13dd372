"""Arithmetic on Params: weights with a leading task axis, (T, *shape)."""

from collections.abc import Callable

import torch
from torch import Tensor

from metalib.types import Params


def tile(params: Params, tasks: int) -> Params:
    """(*shape) -> (tasks, *shape), every task the same weights: a view, and differentiable."""
    return {name: value.expand(tasks, *value.shape) for name, value in params.items()}


def detach(params: Params) -> Params:
    """The same values as new leaves that collect gradients."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def map_with(f: Callable[..., Tensor], *params: Params) -> Params:
    """f applied name by name."""
    return {name: f(*(p[name] for p in params)) for name in params[0]}


def axpy(a: Tensor | float, x: Params, y: Params) -> Params:
    """a x + y; `a` is one number, or one per task (T,)."""
    if isinstance(a, Tensor):
        return map_with(lambda p, q: torch.addcmul(q, p, _per_task(a, p)), x, y)
    return map_with(lambda p, q: torch.add(q, p, alpha=a), x, y)


def sub(x: Params, y: Params) -> Params:
    """x - y."""
    return map_with(torch.sub, x, y)


def scale(a: Tensor | float, x: Params) -> Params:
    """a x; `a` is one number, or one per task (T,)."""
    return map_with(lambda p: p * (_per_task(a, p) if isinstance(a, Tensor) else a), x)


def dot(x: Params, y: Params) -> Tensor:
    """Inner product of each task's weights, (T,)."""
    return torch.stack([(x[name] * y[name]).flatten(1).sum(1) for name in x]).sum(0)


def where(condition: Tensor, x: Params, y: Params) -> Params:
    """The weights of x for the tasks where condition (T,) holds, of y for the others."""
    return map_with(lambda p, q: torch.where(_per_task(condition, p), p, q), x, y)


def mean_tasks(params: Params) -> Params:
    """(T, *shape) -> (*shape)."""
    return map_with(lambda p: p.mean(0), params)


def grad(of: Tensor, at: Params, create_graph: bool = False) -> Params:
    """Gradient of a scalar; weights it does not depend on get zeros."""
    values = torch.autograd.grad(of, list(at.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(at, values, strict=True))


def _per_task(a: Tensor, p: Tensor) -> Tensor:
    return a.view(-1, *[1] * (p.ndim - 1))
