"""All tasks at once by torch.func.vmap."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.loop import proximal
from benchmarks.peers.network import (
    Call,
    Hyper,
    Task,
    cg,
    features,
    flat,
    head_loss,
    task_loss,
    to_ours,
    to_theirs,
    together,
    unflat,
    written_norm,
)
from benchmarks.work import Item
from metalib.types import Params, TaskBatch


def prepare(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """vmap of one task's loss (MAML) or of its gradient, whichever is faster."""
    of_tasks = VMAP.get(item.learner)
    if of_tasks is None:
        return None
    theta, tasks = to_theirs(params), together(batch)
    return lambda: to_ours(of_tasks(item.hyper, theta, tasks))


def maml(hyper: Hyper, theta: Params, tasks: Task) -> Any:
    def loss(weights: Params, x: Tensor, y: Tensor) -> Tensor:
        return head_loss(weights, features(weights, x, written_norm), y)

    def query_loss(theta: Params, task: Task) -> Tensor:
        return loss(descend(hyper, theta, task, loss), task.query_x, task.query_y)

    def mean_loss(theta: Params) -> Tensor:
        return torch.func.vmap(query_loss, (None, 0))(theta, tasks).mean()

    return torch.func.grad(mean_loss)(theta)


def averaged(of_task: Callable[[Hyper, Params, Task], Any]) -> Callable[[Hyper, Params, Task], Params]:
    def of_tasks(hyper: Hyper, theta: Params, tasks: Task) -> Params:
        grads = torch.func.vmap(functools.partial(of_task, hyper), (None, 0))(theta, tasks)
        return {name: g.mean(0) for name, g in grads.items()}

    return of_tasks


def fomaml(hyper: Hyper, theta: Params, task: Task) -> Any:
    return torch.func.grad(task_loss)(descend(hyper, theta, task), task.query_x, task.query_y)


def imaml(hyper: Hyper, theta: Params, task: Task) -> Any:
    phi = descend(hyper, theta, task)
    right = torch.func.grad(task_loss)(phi, task.query_x, task.query_y)
    hvp = torch.func.vjp(lambda phi: torch.func.grad(task_loss)(phi, task.x, task.y), phi)[1]

    def matvec(v: Tensor) -> Tensor:
        (product,) = hvp(unflat(v, theta), retain_graph=True, create_graph=False)
        return proximal(hyper, v, flat(product))

    return unflat(cg(matvec, flat(right), hyper["cg_steps"]), theta)


def descend(hyper: Hyper, theta: Params, task: Task, loss: Callable[..., Tensor] = task_loss) -> Params:
    lam, phi = hyper.get("lam", 0.0), theta
    for _ in range(hyper["inner_steps"]):
        grads = torch.func.grad(loss)(phi, task.x, task.y)
        if lam:
            grads = {name: g + lam * (phi[name] - theta[name]) for name, g in grads.items()}
        phi = {name: value - hyper["inner_lr"] * grads[name] for name, value in phi.items()}
    return phi


VMAP: dict[str, Callable[[Hyper, Params, Task], Params]] = {
    "fomaml": averaged(fomaml),
    "imaml": averaged(imaml),
    "maml": maml,
}
