"""The expansions of MAML's, FOMAML's and Reptile's expected updates, measured on any twice differentiable loss.

Slide "Reptile" (Nichol, Achiam, Schulman 2018, section 5.1, https://arxiv.org/abs/1803.02999). Mini-batches are drawn
independently; g and H are their gradients and Hessians at theta, k is the number of gradients, alpha a small rate. With
AvgGrad = E[g] and AvgGradInner = E[H_2 g_1] = 1/2 d/d theta E[g_1 . g_2],

    E[g_MAML]    =    AvgGrad -      2 (k - 1) alpha AvgGradInner
    E[g_FOMAML]  =    AvgGrad -        (k - 1) alpha AvgGradInner
    E[g_Reptile] =  k AvgGrad - 1/2 k (k - 1) alpha AvgGradInner,      each + O(alpha^2).

MAML and FOMAML take k - 1 inner steps, and mini-batch k is their query set; Reptile takes k steps. The expectation is exact,
over all sequences of k out of n given mini-batches, with replacement.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metalib import algorithms, numerics, training, tree
from metalib.data import tasks
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from metalib.randomness import generator
from metalib.types import MetaLearner, Params, TaskBatch, TaskLoss
from studies.update_contents import schema

EXPECTED: dict[str, Callable[[int], tuple[float, float]]] = {
    "maml": lambda k: (1, 2 * (k - 1)),
    "fomaml": lambda k: (1, k - 1),
    "reptile": lambda k: (k, k * (k - 1) / 2),
}
"""Learner -> (k -> the coefficients of AvgGrad and of -alpha AvgGradInner)."""

CHUNK = 16  # sequences at a time: changes memory, not results


class Row(NamedTuple):
    """A row of coefficients.csv: means over tasks, with their standard errors."""

    learner: str
    k: int
    alpha: float
    average: float
    average_error: float
    inner: float
    inner_error: float
    residual: float
    expected_average: float
    expected_inner: float


def measure(values: schema.Coefficients, seed: int, network: Conv4, images: Tensor, pool: Tensor) -> list[Row]:
    """The coefficients at the network's initial weights, in double precision; the smallest alpha comes first.

    Args:
        images: (N, drawers, H, W) uint8.   pool: (n,) characters that tasks are drawn from, in four rotations.
    """
    loss = Conv4Loss(network)
    weights = {name: value.double() for name, value in network.init(generator(seed, "initial weights")).items()}
    random = generator(seed, "update_contents", "mini-batches")
    found = dict[tuple[float, str, int], list[Coefficients]]()
    for _ in range(values.draws):
        drawn = tasks.draw(
            1, pool, way=network.way, images=values.batches * values.shot, drawers=images.shape[1],
            rotations="classes", generators=[random],
        )  # fmt: skip
        task = tasks.gather(images, drawn, values.batches * values.shot)
        # images come shot by shot, so each mini-batch has equally many of each class
        x = task.support_x[0].double().unflatten(0, (values.batches, -1))
        y = task.support_y[0].unflatten(0, (values.batches, -1))
        average, inner_product = average_gradients(loss, weights, x, y)
        for alpha in sorted(values.alphas):
            for name in EXPECTED:
                for k in values.gradients:
                    update = expected_update(name, loss, weights, x, y, k=k, alpha=alpha, chunk=CHUNK)
                    measured = coefficients(update, average, inner_product, alpha)
                    found.setdefault((alpha, name, k), []).append(measured)
    rows = []
    for (alpha, name, k), draws in found.items():
        measures = torch.tensor(draws, dtype=torch.float64)
        mean, error = measures.mean(0).tolist(), (measures.std(0) / math.sqrt(len(draws))).tolist()
        rows.append(Row(name, k, alpha, mean[0], error[0], mean[1], error[1], mean[2], *EXPECTED[name](k)))
    return rows


def expected_update(
    name: str, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, *, k: int, alpha: float, chunk: int | None = None
) -> Params:
    """E[g] of the learner `name` at params (*shape), over sequences of k of the mini-batches x (n, B, ...), y (n, B).

    `chunk` sequences at a time, where all n^k do not fit into memory.
    """
    order = torch.tensor(list(itertools.product(range(len(x)), repeat=k)), device=x.device)
    batch = x.shape[1]
    xs, ys = (values[order].flatten(1, 2) for values in (x, y))  # (n^k, k B, ...)
    hyper = {"inner_lr": alpha, "inner_batch": batch}
    last = (xs[:, -batch:], ys[:, -batch:])
    learner: MetaLearner
    if name == "reptile":
        batches = TaskBatch(xs, ys, *last)
        learner = algorithms.build(name, hyper | {"inner_steps": k, "inner_optimiser": "sgd"})
    else:
        batches = TaskBatch(xs[:, :-batch], ys[:, :-batch], *last)
        learner = algorithms.build(name, hyper | {"inner_steps": k - 1})
    found = training.meta_gradient(learner, loss, tree.once(params), batches, torch.zeros(()), chunk).grads
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
    residual: float  # its norm over that of the AvgGradInner part


def coefficients(update: Params, average: Params, inner_product: Params, alpha: float) -> Coefficients:
    """update = a AvgGrad - b alpha AvgGradInner + residual, by least squares over all weights."""
    u, first, second = (torch.cat([part[name].flatten() for name in update]) for part in (update, average, inner_product))
    basis = torch.stack([first, -alpha * second], 1)
    scale = basis.norm(dim=0)
    solution = torch.linalg.lstsq(basis / scale, u.unsqueeze(1)).solution.squeeze(1) / scale
    left = (u - basis @ solution).norm() / (basis[:, 1] * solution[1]).norm()
    return Coefficients(float(solution[0]), float(solution[1]), float(left))
