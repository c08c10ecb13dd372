"""ANIL: Almost No Inner Loop (Raghu, Raghu, Bengio, Vinyals, ICLR 2020, https://arxiv.org/abs/1909.09157).

Slide "ANIL": MAML whose inner loop adapts the head alone; what the body knows is reused, not relearned. The outer gradient is
MAML's, exact, and reaches the body through the features of both sets. As the body stands still, a task's features are computed
once and serve all inner steps: an inner step costs a matrix product.

Through a head of zero no gradient reaches the body. So where the head starts every task at zero and is not meta-learned
(fixed_head), one inner step of MAML is one of ANIL, and so is its meta-gradient.
"""

from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, SplitLoss, TaskBatch, Watch, need_halves


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ANIL:
    inner_lr: inner.Rate  # alpha
    inner_steps: NonNegativeInt  # k

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: SplitLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        need_halves("anil", loss, params)
        theta = tree.tile(params, len(x))
        body, head = _halves(theta)
        features = loss.body(body, x).detach()
        show = (lambda adapted: watch(body | adapted)) if watch else None
        return body | inner.sgd(loss.head, head, features, y, lr=self.inner_lr, steps=self.inner_steps, watch=show)

    def meta_gradient(self, loss: SplitLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        need_halves("anil", loss, params)
        theta = tree.detach(tree.tile(params, len(tasks.support_x)))
        body, head = _halves(theta)
        phi = inner.sgd(
            loss.head, head, loss.body(body, tasks.support_x), tasks.support_y,
            lr=self.inner_lr, steps=self.inner_steps, create_graph=True,
        )  # fmt: skip
        query_loss = loss(body | phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.mean_tasks(tree.grad(query_loss.sum(), theta)), query_loss.detach())


def _halves(params: Params) -> tuple[Params, Params]:
    """The weights of the body and those of the head."""
    return tree.without(params, "head."), tree.part(params, "head.")
