"""Meta-SGD (Li, Zhou, Chen, Li 2017, https://arxiv.org/abs/1707.09835).

Slide "Problem Setting": theta, the meta parameter, is more than the initial weights: here also a rate for every weight,

    phi <- phi - a * grad L_A(phi)  (element by element),      g = d L_B(phi) / d(theta, a),

both exact, through all inner steps. The rates a may become negative: direction is learned, too.
"""

import torch
from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch

RATE = "rate."  # prefix of the meta-parameters that are rates


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MetaSGD:
    inner_lr: inner.Rate  # what every rate starts from
    inner_steps: NonNegativeInt  # k; the paper's is 1

    def init(self, params: Params) -> Params:
        return params | {RATE + name: torch.full_like(value, self.inner_lr) for name, value in params.items()}

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        return tree.detach(self._descend(loss, tree.detach(tree.tile(params, len(x))), x, y, create_graph=False, watch=watch))

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        theta = tree.detach(tree.tile(params, len(tasks.support_x)))
        phi = self._descend(loss, theta, tasks.support_x, tasks.support_y, create_graph=True)
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.mean_tasks(tree.grad(query_loss.sum(), theta)), query_loss.detach())

    def _descend(
        self, loss: TaskLoss, theta: Params, x: Tensor, y: Tensor, *, create_graph: bool, watch: Watch | None = None
    ) -> Params:
        phi = tree.without(theta, RATE)
        if watch:
            watch(phi)
        for _ in range(self.inner_steps):
            grads = tree.grad(loss(phi, x, y).sum(), phi, create_graph)
            phi = {name: torch.addcmul(value, theta[RATE + name], grads[name], value=-1) for name, value in phi.items()}
            if not create_graph:
                phi = tree.detach(phi)
            if watch:
                watch(phi)
        return phi
