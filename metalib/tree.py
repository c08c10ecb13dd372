"""Arithmetic on Params: weights with a leading task axis, (T, *shape).

Replicas: R trainings, each with meta-parameters and tasks of its own, can go through a learner in one call, because the task
axis keeps them apart anyway. Inside `with replicas(R)` meta-parameters are (R, *shape), and T counts the tasks of all
replicas, those of the first replica first. Only `tile`, `once` and `mean_tasks`, the ways in and out, have to know.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from metalib.types import Params

_replicas: ContextVar[int | None] = ContextVar("replicas", default=None)


@contextmanager
def replicas(count: int) -> Iterator[None]:
    """Meta-parameters are (count, *shape) inside."""
    token = _replicas.set(count)
    try:
        yield
    finally:
        _replicas.reset(token)


def tile(params: Params, tasks: int) -> Params:
    """(*shape) -> (tasks, *shape), every task the same weights: a view, where there are no replicas or one.

    With replicas: (R, *shape) -> (tasks, *shape), every task its replica's weights; `tasks` is a multiple of R.
    """
    return map_with(lambda v: v.unsqueeze(1).expand(-1, tasks // len(v), *v.shape[1:]).flatten(0, 1), once(params))


def once(params: Params) -> Params:
    """(*shape) -> (1, *shape), weights that serve all tasks; with replicas (R, *shape) as it is."""
    return params if _replicas.get() else map_with(lambda v: v.unsqueeze(0), params)


def detach(params: Params) -> Params:
    """The same values as new leaves that collect gradients."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def part(params: Params, *prefixes: str) -> Params:
    """Those whose names begin with one of the prefixes."""
    return {name: value for name, value in params.items() if name.startswith(prefixes)}


def without(params: Params, *prefixes: str) -> Params:
    """Those whose names begin with none of the prefixes."""
    return {name: value for name, value in params.items() if not name.startswith(prefixes)}


def map_with(f: Callable[..., Tensor], *params: Params) -> Params:
    """f applied name by name."""
    return {name: f(*(p[name] for p in params)) for name in params[0]}


def axpy(a: Tensor | float, x: Params, y: Params) -> Params:
    """a x + y; `a` is one number, or one per task (T,)."""
    if isinstance(a, Tensor):
        return map_with(lambda p, q: torch.addcmul(q, p, per_task(a, p)), x, y)
    return map_with(lambda p, q: torch.add(q, p, alpha=a), x, y)


def sub(x: Params, y: Params) -> Params:
    """x - y."""
    return map_with(torch.sub, x, y)


def scale(a: Tensor | float, x: Params) -> Params:
    """a x; `a` is one number, or one per task (T,)."""
    return map_with(lambda p: p * (per_task(a, p) if isinstance(a, Tensor) else a), x)


def dot(x: Params, y: Params) -> Tensor:
    """Inner product of each task's weights, (T,)."""
    return torch.stack([(x[name] * y[name]).flatten(1).sum(1) for name in x]).sum(0)


def where(condition: Tensor, x: Params, y: Params) -> Params:
    """The weights of x for the tasks where condition (T,) holds, of y for the others."""
    return map_with(lambda p, q: torch.where(per_task(condition, p), p, q), x, y)


def mean_tasks(params: Params) -> Params:
    """(T, *shape) -> (*shape); with replicas the mean over each one's tasks, (R, *shape)."""
    count = _replicas.get()
    return map_with(lambda p: p.mean(0) if count is None else p.unflatten(0, (count, -1)).mean(1), params)


def grad(of: Tensor, at: Params, create_graph: bool = False) -> Params:
    """Gradient of a scalar; weights it does not depend on get zeros."""
    values = torch.autograd.grad(of, list(at.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(at, values, strict=True))


def per_task(a: Tensor, p: Tensor) -> Tensor:
    """One number per task, (T,), shaped to go with weights p (T, *shape)."""
    return a.view(-1, *[1] * (p.ndim - 1))
