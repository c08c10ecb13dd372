"""Leap: Transferring Knowledge across Learning Processes (Flennerhag et al., ICLR 2019, https://arxiv.org/abs/1812.01054).

Slide "Leap": learn the initial weights from which gradient descent travels the shortest way. The points along the way are
gamma^i = (theta^i, L(theta^i)), on the loss surface; the slide's d = sum_i ||theta^{i+1} - theta^i|| is without L.

    d = sum_i ||gamma^{i+1} - gamma^i||^p,      p = 1 (length) or 2 (energy)

The gradient with respect to theta^0 takes the next point as fixed and every Jacobian d theta^i / d theta^0 as I, so step i adds

    [ (theta^i - theta^{i+1}) - dL grad L(theta^i) ] / ||gamma^{i+1} - gamma^i||,      dL = L(theta^{i+1}) - L(theta^i)

(energy: without the division; the authors drop its factor 2). The norm is joint over all weights. The stabiliser takes
-|dL| for dL, so that a step up the loss surface does not reverse the gradient. K steps have K segments here, as on
the slide; the authors' code never sees the last one (github.com/amzn/metalearn-leap, leap.py).

Without loss and norm the gradient is theta - phi: Reptile's.
"""

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Leap:
    inner_lr: inner.Rate  # alpha
    inner_steps: NonNegativeInt  # K
    inner_batch: PositiveInt | None = None  # images in an inner step; null: the whole support set
    norm: bool  # true: length, p = 1; false: energy, p = 2
    loss: bool  # whether the way runs over the loss surface, or through the weights alone
    stabiliser: bool

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, watch=watch)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        theta = tree.detach(tree.tile(params, len(tasks.support_x)))
        total = tree.scale(0.0, theta)
        here = loss(theta, *self._batch(tasks, 0))
        for step in range(self.inner_steps):
            grads = tree.grad(here.sum(), theta)
            after = tree.detach(tree.axpy(-self.inner_lr, grads, theta))
            with torch.set_grad_enabled(step + 1 < self.inner_steps):
                there = loss(after, *self._batch(tasks, step + 1))  # each end of the segment on its own mini-batch
            with torch.no_grad():
                change = there - here if self.loss else torch.zeros_like(here)
                if self.stabiliser:
                    change = -change.abs()
                moved = tree.sub(theta, after)
                increment = tree.axpy(-change, grads, moved)
                if self.norm:
                    length = (change.square() + tree.dot(moved, moved)).sqrt()
                    increment = tree.scale(torch.where(length > 0, 1 / length, 0), increment)
                total = tree.axpy(1.0, increment, total)
            theta, here = after, there
        with torch.no_grad():
            return MetaGradient(tree.mean_tasks(total), loss(theta, tasks.query_x, tasks.query_y))

    def _batch(self, tasks: TaskBatch, step: int) -> tuple[Tensor, Tensor]:
        return inner.minibatch(tasks.support_x, tasks.support_y, self.inner_batch, step)
