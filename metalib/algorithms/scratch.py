"""No meta-learning: random initial weights, trained on each task from scratch (Leap's baseline "no pretraining").

Flennerhag et al. 2019 (https://arxiv.org/abs/1812.01054), section 4.1. What every learner of the slides has to beat.
"""

import torch
from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Scratch:
    inner_lr: inner.Rate
    inner_steps: NonNegativeInt

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, watch=watch)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        phi = self.adapt(loss, params, tasks.support_x, tasks.support_y)
        with torch.no_grad():
            nothing = tree.map_with(torch.zeros_like, params)
            return MetaGradient(nothing, loss(phi, tasks.query_x, tasks.query_y))
