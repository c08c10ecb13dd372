"""MAML with truncated back-propagation (Shaban, Cheng, Hatch, Boots, AISTATS 2019, https://arxiv.org/abs/1810.10667).

Slide "Complexity", row "Truncated back-prop": k inner steps, of which only the last `backprop_steps` are differentiated; the
Jacobian of those before is taken for I. Memory grows with backprop_steps, not with k. All of them is MAML, none is FOMAML.
"""

from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TruncatedMAML:
    inner_lr: inner.Rate  # alpha
    inner_steps: NonNegativeInt  # k
    backprop_steps: NonNegativeInt  # of the last inner steps; more than there are means all

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, watch=watch)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        x, y = tasks.support_x, tasks.support_y
        through = min(self.backprop_steps, self.inner_steps)
        middle = inner.sgd(loss, tree.tile(params, len(x)), x, y, lr=self.inner_lr, steps=self.inner_steps - through)
        phi = inner.sgd(loss, middle, x, y, lr=self.inner_lr, steps=through, create_graph=True)
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.mean_tasks(tree.grad(query_loss.sum(), middle)), query_loss.detach())
