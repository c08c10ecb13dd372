"""Reptile: On First-Order Meta-Learning Algorithms (Nichol, Achiam, Schulman 2018, https://arxiv.org/abs/1803.02999).

Slide "Reptile": phi~ = U_tau^k(phi), k steps of SGD or Adam on the task's training images; then phi <- phi + eps (phi~ - phi).
As a gradient for the outer optimiser,

    g_Reptile = theta - mean_t phi_t,      which SGD with rate eps turns into the slide's step.

The serial version of the slide is meta_batch 1, the batched one any other; eps annealed to 0 is the outer schedule `linear`.
It has no query set: all images of a meta-training task are for the inner steps (`train.shot` in params.yaml).
"""

from typing import Literal

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch

SECOND = "adam."  # prefix of the meta-parameters that carry Adam's second moments from task to task
WEIGHT = "adam.weight"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Reptile:
    inner_lr: inner.Rate  # alpha
    inner_steps: NonNegativeInt  # k
    inner_batch: PositiveInt | None = None  # images in an inner step; null: the whole support set
    inner_optimiser: Literal["sgd", "adam"]  # adam: with beta1 = 0
    moments: Literal["reset", "carried"] | None = None  # Adam's second moments: fresh in every task, or meta-learned with the
    # weights; SGD has none. (The authors' code never resets them, so that a task starts from the moments the last one left;
    # here it starts from their running mean. Moments must stay positive: carried needs an outer SGD with a rate of at most 1.)

    @model_validator(mode="after")
    def _adam_has_moments(self) -> "Reptile":
        if self.moments == "carried" and self.inner_optimiser == "sgd":
            raise ValueError("moments: carried needs inner_optimiser adam; SGD has no moments")
        if self.moments is None and self.inner_optimiser == "adam":
            raise ValueError("moments is missing: inner_optimiser adam needs reset or carried")
        return self

    def init(self, params: Params) -> Params:
        if self.moments != "carried":
            return params
        second = {SECOND + name: torch.zeros_like(value) for name, value in params.items()}
        return params | second | {WEIGHT: next(iter(params.values())).new_zeros(())}

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        return tree.without(self._run(loss, params, x, y, watch), SECOND)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        phi = self._run(loss, params, tasks.support_x, tasks.support_y)
        with torch.no_grad():
            query_loss = loss(phi, tasks.query_x, tasks.query_y)
            return MetaGradient(tree.sub(params, tree.mean_tasks(phi)), query_loss)

    def _run(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        """The meta-parameters (T, *shape) after k inner steps, carried moments included."""
        tiled = tree.tile(params, len(x))
        theta = tree.without(tiled, SECOND)
        if self.inner_optimiser == "sgd":
            return tiled | inner.sgd(
                loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, watch=watch
            )
        if self.moments == "carried":
            second, weight = {name: tiled[SECOND + name] for name in theta}, tiled[WEIGHT]
        else:
            second = tree.map_with(torch.zeros_like, theta)
            weight = torch.zeros_like(next(iter(theta.values())).flatten(1)[:, 0])
        phi, second, weight = inner.adam(
            loss, theta, x, y,
            lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, second=second, weight=weight, watch=watch,
        )  # fmt: skip
        if self.moments == "reset":
            return phi
        return phi | {SECOND + name: value for name, value in second.items()} | {WEIGHT: weight}
