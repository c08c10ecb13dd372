"""What the updates of MAML, FOMAML and Reptile contain, measured on any twice differentiable loss.

Slide "Reptile", the expansions (Nichol, Achiam, Schulman 2018, section 5.1, https://arxiv.org/abs/1803.02999): for mini-batches
drawn independently, g and H their gradients and Hessians at theta, AvgGrad = E[g], AvgGradInner = E[H_2 g_1] =
1/2 d/d theta E[g_1 . g_2], k gradients in all, and a small rate alpha,

    E[g_MAML]    =    AvgGrad -      2 (k - 1) alpha AvgGradInner
    E[g_FOMAML]  =    AvgGrad -        (k - 1) alpha AvgGradInner
    E[g_Reptile] =  k AvgGrad - 1/2 k (k - 1) alpha AvgGradInner,      each + O(alpha^2).

MAML and FOMAML take k - 1 inner steps, and mini-batch k is their query set; Reptile takes k steps. The expectation is over
all sequences of k of n given mini-batches, with replacement, so that it is no estimate.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metalib import algorithms, inner, numerics, training, tree
from metalib.types import MetaLearner, Params, TaskBatch, TaskLoss

EXPECTED: dict[str, Callable[[int], tuple[float, float]]] = {
    "maml": lambda k: (1, 2 * (k - 1)),
    "fomaml": lambda k: (1, k - 1),
    "reptile": lambda k: (k, k * (k - 1) / 2),
}
"""Learner -> (k -> the coefficients of AvgGrad and of -alpha AvgGradInner)."""


class InTurn:
    """A loss that takes mini-batch 1 in its first call, 2 in its second, and so on for k calls: those of one meta-gradient."""

    def __init__(self, loss: TaskLoss, batch: int, k: int) -> None:
        self.loss, self.batch, self.k, self.calls = loss, batch, k, 0

    def __call__(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        step = self.calls % self.k
        self.calls += 1
        return self.loss(params, *inner.minibatch(x, y, self.batch, step))  # of the query set, which is one, the whole


def expected_update(
    name: str, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, *, k: int, alpha: float, chunk: int | None = None
) -> Params:
    """E[g] of the learner `name` at params (*shape), over sequences of k of the mini-batches x (n, B, ...), y (n, B).

    `chunk` sequences at a time, where all n^k do not fit into memory.
    """
    order = torch.tensor(list(itertools.product(range(len(x)), repeat=k)), device=x.device)
    batch = x.shape[1]
    xs, ys = (values[order].flatten(1, 2) for values in (x, y))  # (n^k, k B, ...)
    learner: MetaLearner
    if name == "reptile":
        tasks = TaskBatch(xs, ys, xs[:, -batch:], ys[:, -batch:])
        learner = algorithms.build("reptile", {
            "inner_lr": alpha, "inner_steps": k, "inner_batch": batch, "inner_optimiser": "sgd", "moments": "reset",
        })  # fmt: skip
    else:
        tasks = TaskBatch(xs[:, :-batch], ys[:, :-batch], xs[:, -batch:], ys[:, -batch:])
        learner = algorithms.build(name, {"inner_lr": alpha, "inner_steps": k - 1})
        loss = InTurn(loss, batch, k)
    found = training.meta_gradient(learner, loss, tree.once(params), tasks, torch.zeros(()), chunk).grads
    mean = {value_name: value.squeeze(0) for value_name, value in found.items()}
    return tree.scale(1 / alpha, mean) if name == "reptile" else mean


def average_gradients(loss: TaskLoss, params: Params, x: Tensor, y: Tensor) -> tuple[Params, Params]:
    """AvgGrad and AvgGradInner, which is (mean H)(mean g), at params (*shape) for mini-batches x (n, B, ...), y (n, B)."""
    _, grads, product = numerics.hessian(lambda weights: loss(weights, x, y), tree.tile(params, len(x)))
    average = tree.mean_tasks(grads)
    return average, tree.mean_tasks(product(tree.tile(average, len(x))))


class Coefficients(NamedTuple):
    average: float  # of AvgGrad
    inner: float  # of -alpha AvgGradInner
    residual: float  # length of what is left, over that of the AvgGradInner part


def coefficients(update: Params, average: Params, inner_product: Params, alpha: float) -> Coefficients:
    """update = a AvgGrad - b alpha AvgGradInner + residual, by least squares over all weights."""
    u, first, second = (torch.cat([part[name].flatten() for name in update]) for part in (update, average, inner_product))
    basis = torch.stack([first, -alpha * second], 1)
    scale = basis.norm(dim=0)
    solution = torch.linalg.lstsq(basis / scale, u.unsqueeze(1)).solution.squeeze(1) / scale
    left = (u - basis @ solution).norm() / (basis[:, 1] * solution[1]).norm()
    return Coefficients(float(solution[0]), float(solution[1]), float(left))
