"""The same meta-gradients by other means: a loop over tasks in everyday PyTorch, other libraries, torch.func, JAX.

A peer is a function (item, params, batch) -> call; the call returns the meta-gradient, named and shaped as ours. What a
training does once (modules, the kernels' layout) is done before the call. None: the peer lacks this learner; ImportError: it
is not installed.

All peers compute Conv4.plain with the mean head on kernels of PyTorch's own layout, (out, in, 3, 3), and the query loss.
"""

import functools
import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.work import Item
from metalib.types import Params, TaskBatch

Call = Callable[[], Params]
Hyper = dict[str, Any]
JAX_IMAGES = 320  # W1's; its convolutions with a kernel per task are too slow on CPUs to wait for with more


class Task(NamedTuple):
    """One task's images (B, 1, H, W), labels (B,) and classes (way,), or those of all tasks, (T, ...)."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor


def together(batch: TaskBatch) -> Task:
    assert batch.classes is not None
    return Task(batch.support_x, batch.support_y, batch.query_x, batch.query_y, batch.classes)


def tasks_of(batch: TaskBatch) -> list[Task]:
    return [Task(*one) for one in zip(*together(batch), strict=True)]


def to_theirs(params: Params) -> Params:
    """Copies of the meta-parameters, kernels (out, 3, 3, in) as (out, in, 3, 3)."""
    return {name: (p.permute(0, 3, 1, 2) if p.ndim == 4 else p).detach().clone().contiguous() for name, p in params.items()}


def to_ours(grads: Params) -> Params:
    return {name: g.detach().permute(0, 2, 3, 1) if g.ndim == 4 else g.detach() for name, g in grads.items()}


# ------------------------------------------------------------------------------------------------ the network as a function


def library_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, scale, shift, training=True)


def written_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Batch norm for grad of vmap, where torch 2.14 gets the second derivative of F.batch_norm wrong."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return torch.addcmul(shift[:, None, None], x - mean, torch.rsqrt(var + 1e-5) * scale[:, None, None])


def features(weights: Params, x: Tensor, norm: Callable[[Tensor, Tensor, Tensor], Tensor] = library_norm) -> Tensor:
    for layer in (1, 2, 3, 4):
        x = F.conv2d(x, weights[f"conv{layer}.weight"], stride=2, padding=1)
        x = F.relu(norm(x, weights[f"norm{layer}.weight"], weights[f"norm{layer}.bias"]))
    return x.mean((2, 3))


def head_loss(weights: Params, features: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weights["head.weight"], weights["head.bias"]), y)


def task_loss(weights: Params, x: Tensor, y: Tensor) -> Tensor:
    return head_loss(weights, features(weights, x), y)


def grad(of: Tensor, at: Params, create_graph: bool = False) -> Params:
    return dict(zip(at, torch.autograd.grad(of, list(at.values()), create_graph=create_graph), strict=True))


def leaves(weights: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in weights.items()}


# ------------------------------------------------------------------------------------------------ loop over tasks


def loop(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """Task after task by torch.autograd.grad, as the authors' codes do it."""
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
    head = {name: value for name, value in theta.items() if name.startswith("head.")}
    support = features(theta, task.x)
    for _ in range(hyper["inner_steps"]):
        grads = grad(head_loss(head, support, task.y), head, create_graph=True)
        head = {name: value - hyper["inner_lr"] * grads[name] for name, value in head.items()}
    return grad(task_loss(theta | head, task.query_x, task.query_y), theta)


def meta_sgd(hyper: Hyper, theta: Params, task: Task) -> Params:
    phi = {name: value for name, value in theta.items() if not name.startswith("rate.")}
    for _ in range(hyper["inner_steps"]):
        grads = grad(task_loss(phi, task.x, task.y), phi, create_graph=True)
        phi = {name: value - theta[f"rate.{name}"] * grads[name] for name, value in phi.items()}
    return grad(task_loss(phi, task.query_x, task.query_y), theta)


def maml_plus_plus(hyper: Hyper, theta: Params, task: Task) -> Params:
    """Without the multi-step loss, as after the first part of a training."""
    norms = [name for name in theta if name.startswith("norm")]
    phi = {name: value for name, value in theta.items() if name not in norms and not name.startswith("rate.")}
    norm = Params()
    for step in range(hyper["inner_steps"]):
        norm = {name: theta[name][step] for name in norms}
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
    at = {name: value for name, value in theta.items() if not name.startswith("head.")}
    joint = {name: theta[f"joint.{name}"] for name in ("head.weight", "head.bias")}
    sets = ((task.x, task.y), (task.query_x, task.query_y))
    return grad(torch.stack([head_loss(joint, features(theta, x), task.classes[y]) for x, y in sets]).mean(), at)


def scratch(hyper: Hyper, theta: Params, task: Task) -> Params:
    phi = descend(theta, task.x, task.y, hyper["inner_lr"], hyper["inner_steps"])
    with torch.no_grad():
        task_loss(phi, task.query_x, task.query_y)
        return {}


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


def minibatch(task: Task, batch: int, step: int) -> tuple[Tensor, Tensor]:
    """`batch` images of the support set in a row, round and round."""
    rows = torch.arange(step * batch, (step + 1) * batch, device=task.x.device) % len(task.x)
    return task.x[rows], task.y[rows]


def flat(weights: Params) -> Tensor:
    return torch.cat([value.reshape(-1) for value in weights.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def cg(matvec: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Conjugate gradient; a direction without positive curvature ends it (b itself, when it is the first)."""
    x, r, p = torch.zeros_like(b), b, b
    rr = r @ r
    going = rr > 0
    for step in range(steps):
        ap = matvec(p)
        curvature = p @ ap
        going = going & (curvature > 0)
        alpha = torch.where(going, rr / curvature, 1.0 if step == 0 else 0.0)
        x, r = x + alpha * p, r - alpha * ap
        after = r @ r
        p, rr = r + after / rr * p, after
    return x


# ------------------------------------------------------------------------------------------------ torch.func


def vmap(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """All tasks at once by torch.func.vmap, of one task's loss (MAML) or gradient, whichever is the faster."""
    of_tasks = VMAP.get(item.learner)
    if of_tasks is None:
        return None
    theta, tasks = to_theirs(params), together(batch)
    return lambda: to_ours(of_tasks(item.hyper, theta, tasks))


def vmap_maml(hyper: Hyper, theta: Params, tasks: Task) -> Any:
    def loss(weights: Params, x: Tensor, y: Tensor) -> Tensor:
        return head_loss(weights, features(weights, x, written_norm), y)

    def query_loss(theta: Params, task: Task) -> Tensor:
        return loss(vmap_descend(hyper, theta, task, loss), task.query_x, task.query_y)

    def mean_loss(theta: Params) -> Tensor:
        return torch.func.vmap(query_loss, (None, 0))(theta, tasks).mean()

    return torch.func.grad(mean_loss)(theta)


def averaged(of_task: Callable[[Hyper, Params, Task], Any]) -> Callable[[Hyper, Params, Task], Params]:
    def of_tasks(hyper: Hyper, theta: Params, tasks: Task) -> Params:
        grads = torch.func.vmap(functools.partial(of_task, hyper), (None, 0))(theta, tasks)
        return {name: g.mean(0) for name, g in grads.items()}

    return of_tasks


def vmap_fomaml(hyper: Hyper, theta: Params, task: Task) -> Any:
    return torch.func.grad(task_loss)(vmap_descend(hyper, theta, task), task.query_x, task.query_y)


def vmap_imaml(hyper: Hyper, theta: Params, task: Task) -> Any:
    phi = vmap_descend(hyper, theta, task)
    right = torch.func.grad(task_loss)(phi, task.query_x, task.query_y)
    hvp = torch.func.vjp(lambda phi: torch.func.grad(task_loss)(phi, task.x, task.y), phi)[1]

    def matvec(v: Tensor) -> Tensor:
        (product,) = hvp(unflat(v, theta), retain_graph=True, create_graph=False)
        return proximal(hyper, v, flat(product))

    return unflat(cg(matvec, flat(right), hyper["cg_steps"]), theta)


def vmap_descend(hyper: Hyper, theta: Params, task: Task, loss: Callable[..., Tensor] = task_loss) -> Params:
    lam, phi = hyper.get("lam", 0.0), theta
    for _ in range(hyper["inner_steps"]):
        grads = torch.func.grad(loss)(phi, task.x, task.y)
        if lam:
            grads = {name: g + lam * (phi[name] - theta[name]) for name, g in grads.items()}
        phi = {name: value - hyper["inner_lr"] * grads[name] for name, value in phi.items()}
    return phi


VMAP: dict[str, Callable[[Hyper, Params, Task], Params]] = {
    "fomaml": averaged(vmap_fomaml),
    "imaml": averaged(vmap_imaml),
    "maml": vmap_maml,
}


# ------------------------------------------------------------------------------------------------ libraries that take a module


def module_of(item: Item, params: Params) -> nn.Module:
    """The network as the module a user of these libraries would write; its weights have our names."""
    layers, channels = OrderedDict[str, nn.Module](), 1
    for layer in (1, 2, 3, 4):
        layers[f"conv{layer}"] = nn.Conv2d(channels, 64, 3, stride=2, padding=1, bias=False)
        layers[f"norm{layer}"] = nn.BatchNorm2d(64, track_running_stats=False)
        layers[f"relu{layer}"] = nn.ReLU()
        channels = 64
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(64, item.way)}
    module = nn.Sequential(layers)
    weights = to_theirs(params)
    module.to(next(iter(weights.values())))
    module.load_state_dict(weights)
    return module


def take_gradient(weights: Mapping[str, Tensor]) -> Params:
    """The gradient that backward() left on the weights, which then have none."""
    grads = {name: value.grad for name, value in weights.items() if value.grad is not None}
    for value in weights.values():
        value.grad = None
    return to_ours(grads)


def learn2learn(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    library = learn2learn_maml()
    if item.learner not in ("maml", "fomaml"):
        return None
    module, tasks = module_of(item, params), tasks_of(batch)
    weights = dict(module.named_parameters())
    learner = library.MAML(module, lr=item.hyper["inner_lr"], first_order=item.learner == "fomaml")

    def call() -> Params:
        for task in tasks:
            clone = learner.clone()
            for _ in range(item.hyper["inner_steps"]):
                clone.adapt(F.cross_entropy(clone(task.x), task.y))
            (F.cross_entropy(clone(task.query_x), task.query_y) / len(tasks)).backward()
        return take_gradient(weights)

    return call


@functools.cache
def learn2learn_maml() -> ModuleType:
    """Its module algorithms.maml, from a checkout where LEARN2LEARN names one.

    Two empty packages stand for the checkout's own: their __init__ import all of the library and of what it depends on.
    """
    if folder := os.environ.get("LEARN2LEARN"):
        for name in ("learn2learn", "learn2learn.algorithms"):
            stub = ModuleType(name)
            stub.__path__ = [str(Path(folder, *name.split(".")))]
            sys.modules[name] = stub
    return importlib.import_module("learn2learn.algorithms.maml")


def higher(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    library = importlib.import_module("higher")
    if item.learner not in ("maml", "fomaml"):
        return None
    module, tasks = module_of(item, params), tasks_of(batch)
    weights = dict(module.named_parameters())
    inner = torch.optim.SGD(weights.values(), lr=item.hyper["inner_lr"])
    exact = item.learner == "maml"

    def call() -> Params:
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for task in tasks:
            with library.innerloop_ctx(module, inner, copy_initial_weights=False, track_higher_grads=exact) as (net, step):
                for _ in range(item.hyper["inner_steps"]):
                    step.step(F.cross_entropy(net(task.x), task.y))
                loss = F.cross_entropy(net(task.query_x), task.query_y)
                at = list(net.parameters(time=0 if exact else -1))
                for name, g in zip(weights, torch.autograd.grad(loss, at), strict=True):
                    total[name].add_(g, alpha=1 / len(tasks))
        return to_ours(total)

    return call


def torchopt(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """It has no first-order mode."""
    library = importlib.import_module("torchopt")
    if item.learner != "maml":
        return None
    module, tasks = module_of(item, params), tasks_of(batch)
    weights = dict(module.named_parameters())
    inner = library.MetaSGD(module, lr=item.hyper["inner_lr"])
    start, fresh = library.extract_state_dict(module, by="reference"), library.extract_state_dict(inner)

    def call() -> Params:
        for task in tasks:
            for _ in range(item.hyper["inner_steps"]):
                inner.step(F.cross_entropy(module(task.x), task.y))
            (F.cross_entropy(module(task.query_x), task.query_y) / len(tasks)).backward()
            library.recover_state_dict(module, start)
            library.recover_state_dict(inner, fresh)
        return take_gradient(weights)

    return call


# ------------------------------------------------------------------------------------------------ JAX


def jax_vmap(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """jit of vmap: all tasks at once."""
    jax = importlib.import_module("jax")
    return jax_call(item, params, batch, lambda of_task, tasks: jax.vmap(of_task)(tasks))


def jax_map(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """jit of lax.map: task after task in compiled code."""
    jax = importlib.import_module("jax")
    return jax_call(item, params, batch, lambda of_task, tasks: jax.lax.map(of_task, tasks))


def jax_call(item: Item, params: Params, batch: TaskBatch, over_tasks: Callable[[Any, Any], Any]) -> Call | None:
    """JAX uses as many threads as there are cores, whatever torch is told."""
    jax = importlib.import_module("jax")
    images = item.tasks * item.way * (item.shot + item.query)
    if item.learner != "maml" or images * item.hyper["inner_steps"] > JAX_IMAGES or batch.support_x.device.type != "cpu":
        return None
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # allows float64; float32 stays what it is

    def loss(weights: Any, x: Any, y: Any) -> Any:
        for layer in (1, 2, 3, 4):
            x = jax.lax.conv_general_dilated(x, weights[f"conv{layer}.weight"], (2, 2), ((1, 1), (1, 1)))
            centred = x - x.mean((0, 2, 3), keepdims=True)
            x = centred * jax.lax.rsqrt((centred**2).mean((0, 2, 3), keepdims=True) + 1e-5)
            gamma, beta = (weights[f"norm{layer}.{part}"][None, :, None, None] for part in ("weight", "bias"))
            x = jax.nn.relu(gamma * x + beta)
        logits = x.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]
        return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, item.way, dtype=x.dtype)).sum(1).mean()

    def query_loss(theta: Any, task: Any) -> Any:
        x, y, query_x, query_y = task
        phi = theta
        for _ in range(item.hyper["inner_steps"]):
            grads = jax.grad(loss)(phi, x, y)
            phi = {name: value - item.hyper["inner_lr"] * grads[name] for name, value in phi.items()}
        return loss(phi, query_x, query_y)

    @jax.jit  # type: ignore[untyped-decorator]
    def mean_gradient(theta: Any, tasks: Any) -> Any:
        return jax.tree.map(lambda g: g.mean(0), over_tasks(lambda task: jax.grad(query_loss)(theta, task), tasks))

    weights = {name: jax.numpy.asarray(value.numpy()) for name, value in to_theirs(params).items()}
    tasks = tuple(jax.numpy.asarray(value.numpy()) for value in together(batch)[:4])
    return lambda: to_ours({n: torch.from_numpy(np.array(g)) for n, g in mean_gradient(weights, tasks).items()})


# ------------------------------------------------------------------------------------------------ all of them

PEERS: dict[str, Callable[[Item, Params, TaskBatch], Call | None]] = {
    "loop": loop,
    "learn2learn": learn2learn,
    "higher": higher,
    "TorchOpt": torchopt,
    "vmap": vmap,
    "JAX vmap": jax_vmap,
    "JAX map": jax_map,
}
PER_TASK = ("loop", "learn2learn", "higher", "TorchOpt")  # what a user has who does not batch tasks by hand


def installed() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the libraries that can be imported, and why the others cannot."""
    versions, absent = dict[str, str](), dict[str, str]()
    for name in ("learn2learn", "higher", "TorchOpt", "JAX"):
        try:
            if name == "learn2learn":
                learn2learn_maml()
                versions[name] = str(importlib.import_module("learn2learn._version").__version__)
            else:
                importlib.import_module(name.lower())
                versions[name] = version(name)
        except Exception as error:  # libraries older than what they depend on fail to import in many ways
            absent[name] = str(error).partition("\n")[0]
    return versions, absent
