"""Task after task in everyday PyTorch, as the authors' codes do it: every learner's meta-gradient to compare with."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.network import (
    Call,
    Hyper,
    Task,
    cg,
    features,
    flat,
    grad,
    head_loss,
    leaves,
    task_loss,
    tasks_of,
    to_ours,
    to_theirs,
    unflat,
)
from benchmarks.work import Item
from metalib import tree
from metalib.types import Params, TaskBatch


def prepare(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """The mean over tasks of `LOOP`'s gradient of one task."""
    of_task = LOOP.get(item.learner)
    if of_task is None:
        return None
    weights, tasks = leaves(to_theirs(params)), tasks_of(batch)

    def call() -> Params:
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for task in tasks:
            for name, g in of_task(item.hyper, weights, task).items():
                total[name].add_(g, alpha=1 / len(tasks))
        return to_ours(total)

    return call


def descend(
    weights: Params, x: Tensor, y: Tensor, lr: float, steps: int, create_graph: bool = False, lam: float = 0.0
) -> Params:
    """Gradient descent on the loss, plus lam/2 times the squared distance from the start."""
    start = weights if create_graph else leaves(weights)
    weights = start
    for _ in range(steps):
        grads = grad(task_loss(weights, x, y), weights, create_graph)
        if lam:
            grads = {name: g + lam * (weights[name] - start[name]) for name, g in grads.items()}
        weights = {name: w - lr * grads[name] for name, w in weights.items()}
        if not create_graph:
            weights = leaves(weights)
    return weights


def maml(hyper: Hyper, theta: Params, task: Task) -> Params:
    phi = descend(theta, task.x, task.y, hyper["inner_lr"], hyper["inner_steps"], create_graph=True)
    return grad(task_loss(phi, task.query_x, task.query_y), theta)


def maml_truncated(hyper: Hyper, theta: Params, task: Task) -> Params:
    through = hyper["backprop_steps"]
    middle = descend(theta, task.x, task.y, hyper["inner_lr"], hyper["inner_steps"] - through)
    return maml(hyper | {"inner_steps": through}, middle, task)


def fomaml(hyper: Hyper, theta: Params, task: Task) -> Params:
    return maml_truncated(hyper | {"backprop_steps": 0}, theta, task)


def anil(hyper: Hyper, theta: Params, task: Task) -> Params:
    """The body's features are computed once for all inner steps."""
    head = tree.part(theta, "head.")
    support = features(theta, task.x)
    for _ in range(hyper["inner_steps"]):
        grads = grad(head_loss(head, support, task.y), head, create_graph=True)
        head = {name: value - hyper["inner_lr"] * grads[name] for name, value in head.items()}
    return grad(task_loss(theta | head, task.query_x, task.query_y), theta)


def meta_sgd(hyper: Hyper, theta: Params, task: Task) -> Params:
    phi = tree.without(theta, "rate.")
    for _ in range(hyper["inner_steps"]):
        grads = grad(task_loss(phi, task.x, task.y), phi, create_graph=True)
        phi = {name: value - theta[f"rate.{name}"] * grads[name] for name, value in phi.items()}
    return grad(task_loss(phi, task.query_x, task.query_y), theta)


def maml_plus_plus(hyper: Hyper, theta: Params, task: Task) -> Params:
    """Without the multi-step loss, as after the first part of a training."""
    norms, phi = tree.part(theta, "norm"), tree.without(theta, "norm", "rate.")
    norm = Params()
    for step in range(hyper["inner_steps"]):
        norm = {name: value[step] for name, value in norms.items()}
        grads = grad(task_loss(phi | norm, task.x, task.y), phi, create_graph=True)
        phi = {name: value - theta[f"rate.{name}"][step] * grads[name] for name, value in phi.items()}
    return grad(task_loss(phi | norm, task.query_x, task.query_y), theta)


def imaml(hyper: Hyper, theta: Params, task: Task) -> Params:
    return implicit(hyper, descend(theta, task.x, task.y, hyper["inner_lr"], hyper["inner_steps"], lam=hyper["lam"]), task)


def imaml_hf(hyper: Hyper, theta: Params, task: Task) -> Params:
    """Newton-CG with Armijo's line search."""
    start = phi = flat(theta).detach()

    def objective(phi: Tensor) -> Tensor:
        return task_loss(unflat(phi, theta), task.x, task.y) + hyper["lam"] / 2 * (phi - start).square().sum()

    for _ in range(hyper["inner_steps"]):
        phi = newton(hyper, objective, phi.detach().requires_grad_())
    return implicit(hyper, leaves(unflat(phi, theta)), task)


def newton(hyper: Hyper, objective: Callable[[Tensor], Tensor], phi: Tensor) -> Tensor:
    value = objective(phi)
    (grads,) = torch.autograd.grad(value, phi, create_graph=True)
    way = cg(lambda v: torch.autograd.grad(grads, phi, v, retain_graph=True)[0], -grads.detach(), hyper["cg_steps"])
    with torch.no_grad():
        for length in (hyper["inner_lr"] / 2**i for i in range(hyper["halvings"] + 1)):
            if objective(phi + length * way) <= value + 1e-4 * length * (grads @ way):
                return phi + length * way
    return phi


def implicit(hyper: Hyper, phi: Params, task: Task) -> Params:
    """The query gradient times the inverse of the proximal problem's Hessian, at the leaves phi."""
    right = flat(grad(task_loss(phi, task.query_x, task.query_y), phi))
    grads = flat(grad(task_loss(phi, task.x, task.y), phi, create_graph=True))

    def matvec(v: Tensor) -> Tensor:
        products = torch.autograd.grad(grads, list(phi.values()), v, retain_graph=True)
        return proximal(hyper, v, flat(dict(zip(phi, products, strict=True))))

    return unflat(cg(matvec, right, hyper["cg_steps"]), phi)


def proximal(hyper: Hyper, v: Tensor, hessian_v: Tensor) -> Tensor:
    return (1 + hyper["damping"]) * v + hessian_v / (hyper["lam"] + hyper["lam_damping"])


def reptile(hyper: Hyper, theta: Params, task: Task) -> Params:
    phi = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    optimiser: torch.optim.Optimizer
    if hyper["inner_optimiser"] == "adam":
        optimiser = torch.optim.Adam(phi.values(), lr=hyper["inner_lr"], betas=(0.0, 0.999))
    else:
        optimiser = torch.optim.SGD(phi.values(), lr=hyper["inner_lr"])
    for step in range(hyper["inner_steps"]):
        optimiser.zero_grad()
        task_loss(phi, *minibatch(task, hyper["inner_batch"], step)).backward()
        optimiser.step()
    with torch.no_grad():
        task_loss(phi, task.query_x, task.query_y)
        return {name: theta[name] - value for name, value in phi.items()}


def leap(hyper: Hyper, theta: Params, task: Task) -> Params:
    """Lengths on the loss surface, with the stabiliser."""
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    here_at = leaves(theta)
    here = task_loss(here_at, *minibatch(task, hyper["inner_batch"], 0))
    for step in range(hyper["inner_steps"]):
        grads = grad(here, here_at)
        after = leaves({name: value - hyper["inner_lr"] * grads[name] for name, value in here_at.items()})
        there = task_loss(after, *minibatch(task, hyper["inner_batch"], step + 1))
        with torch.no_grad():
            climb = -(there - here).abs()
            moved = {name: value - after[name] for name, value in here_at.items()}
            length = (climb.square() + sum(m.square().sum() for m in moved.values())).sqrt()
            for name, value in total.items():
                value.add_((moved[name] - climb * grads[name]) / length)
        here_at, here = after, there
    with torch.no_grad():
        task_loss(here_at, task.query_x, task.query_y)
    return total


def finetune(hyper: Hyper, theta: Params, task: Task) -> Params:
    """One classifier of all classes, on both sets."""
    at = tree.without(theta, "head.")
    joint = {name: theta[f"joint.{name}"] for name in ("head.weight", "head.bias")}
    sets = ((task.x, task.y), (task.query_x, task.query_y))
    return grad(torch.stack([head_loss(joint, features(theta, x), task.classes[y]) for x, y in sets]).mean(), at)


def scratch(hyper: Hyper, theta: Params, task: Task) -> Params:
    phi = descend(theta, task.x, task.y, hyper["inner_lr"], hyper["inner_steps"])
    with torch.no_grad():
        task_loss(phi, task.query_x, task.query_y)
        return {}


def minibatch(task: Task, batch: int, step: int) -> tuple[Tensor, Tensor]:
    """`batch` images of the support set in a row, round and round."""
    rows = torch.arange(step * batch, (step + 1) * batch, device=task.x.device) % len(task.x)
    return task.x[rows], task.y[rows]


LOOP: dict[str, Callable[[Hyper, Params, Task], Params]] = {
    "anil": anil,
    "finetune": finetune,
    "fomaml": fomaml,
    "imaml": imaml,
    "imaml_hf": imaml_hf,
    "leap": leap,
    "maml": maml,
    "maml_plus_plus": maml_plus_plus,
    "maml_truncated": maml_truncated,
    "meta_sgd": meta_sgd,
    "reptile": reptile,
    "scratch": scratch,
}
