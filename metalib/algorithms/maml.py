"""MAML: Model-Agnostic Meta-Learning (Finn, Abbeel, Levine, ICML 2017, https://arxiv.org/abs/1703.03400).

Slides "MAML" and "Algorithm": learn the initial weights theta from which k steps of gradient descent on a task's support
set A give a low loss on its query set B,

    min_theta  E_t [ L_{t,B}( U_{t,A}^k(theta) ) ],      g_MAML = U'_{t,A}(theta)^T  L'_{t,B}(U_{t,A}(theta)).

The Jacobian U' is exact: autograd differentiates through every inner step, second derivatives included.
"""

from pydantic import ConfigDict, NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MAML:
    inner_lr: PositiveFloat  # alpha, on the mean cross-entropy of the support set
    inner_steps: NonNegativeInt  # k

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, watch=watch)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        params = tree.detach(params)
        theta = tree.tile(params, len(tasks.support_x))
        phi = inner.sgd(
            loss, theta, tasks.support_x, tasks.support_y,
            lr=self.inner_lr, steps=self.inner_steps, create_graph=True,
        )  # fmt: skip
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.grad(query_loss.mean(), params), query_loss.detach())
