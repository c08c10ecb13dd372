"""First-order MAML (Finn et al. 2017, section 5.2, https://arxiv.org/abs/1703.03400).

Slide "MAML": as MAML with the Jacobian taken for the identity, U'_{t,A}(theta) = I, so that the meta-gradient is the query
gradient at the adapted weights,

    g_FOMAML = L'_{t,B}(phi),      phi = U_{t,A}^k(theta).

No second derivative is taken, and memory does not grow with the number of inner steps.
"""

from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FOMAML:
    inner_lr: inner.Rate  # alpha, on the mean cross-entropy of the support set
    inner_steps: NonNegativeInt  # k
    inner_batch: PositiveInt | None = None  # images in an inner step; null: the whole support set

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, watch=watch)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        phi = self.adapt(loss, params, tasks.support_x, tasks.support_y)
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.mean_tasks(tree.grad(query_loss.sum(), phi)), query_loss.detach())
