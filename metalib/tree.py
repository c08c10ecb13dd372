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
    if isinstance(a, Tensor) and a.ndim == 1:
        return map_with(lambda p, q: a.view(-1, *[1] * (p.ndim - 1)) * p + q, x, y)
    return map_with(lambda p, q: q + a * p, x, y)


def mean_tasks(params: Params) -> Params:
    """(T, *shape) -> (*shape)."""
    return map_with(lambda p: p.mean(0), params)


def grad(of: Tensor, at: Params, create_graph: bool = False) -> Params:
    """Gradient of a scalar; weights it does not depend on get zeros."""
    values = torch.autograd.grad(of, list(at.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(at, values, strict=True))
