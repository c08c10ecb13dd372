"""MAML in JAX, compiled."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers.network import Call, to_ours, to_theirs, together
from benchmarks.work import Item
from metalib.types import Params, TaskBatch

MOST_IMAGES = 320  # those of W1; with more, JAX's convolutions with a kernel for each task take too long on a CPU


def by_vmap(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """jit of vmap: all tasks at once."""
    jax = importlib.import_module("jax")
    return prepare(item, params, batch, lambda of_task, tasks: jax.vmap(of_task)(tasks))


def by_map(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """jit of lax.map: task after task in compiled code."""
    jax = importlib.import_module("jax")
    return prepare(item, params, batch, lambda of_task, tasks: jax.lax.map(of_task, tasks))


def prepare(item: Item, params: Params, batch: TaskBatch, over_tasks: Callable[[Any, Any], Any]) -> Call | None:
    """JAX uses as many threads as there are cores, whatever torch is told. None for more than MOST_IMAGES, or on a GPU."""
    jax = importlib.import_module("jax")
    images = item.tasks * item.way * (item.shot + item.query)
    if item.learner != "maml" or images * item.hyper["inner_steps"] > MOST_IMAGES or batch.support_x.device.type != "cpu":
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
