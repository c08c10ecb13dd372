"""MAML: Model-Agnostic Meta-Learning (Finn, Abbeel, Levine, ICML 2017, https://arxiv.org/abs/1703.03400).

Slides "MAML" and "Algorithm": learn the initial weights theta from which k steps of gradient descent on a task's support
set A give a low loss on its query set B,

    min_theta  E_t [ L_{t,B}( U_{t,A}^k(theta) ) ],      g_MAML = U'_{t,A}(theta)^T  L'_{t,B}(U_{t,A}(theta)).

The Jacobian U' is exact: autograd differentiates through every inner step, second derivatives included. `recompute` gets the
same gradient without holding the graphs of all k steps: U' is a product of steps, so from v = L'_{t,B}(phi_k) backwards,

    v <- (I - alpha H_j) v,    H_j = L''_{t,A}(phi_j),    j = k-1, ..., 0,

where phi_0, ..., phi_{k-1} were kept and each H_j v is computed when its turn comes.
"""

from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, numerics, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MAML:
    inner_lr: inner.Rate  # alpha, on the mean cross-entropy of the support set
    inner_steps: NonNegativeInt  # k
    inner_batch: PositiveInt | None = None  # images in an inner step; null: the whole support set
    recompute: bool = False  # true: holds each step's weights, but one graph at a time; one more gradient a step

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, watch=watch)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        if self.recompute:
            return self._backwards(loss, params, tasks)
        theta = tree.detach(tree.tile(params, len(tasks.support_x)))
        phi = inner.sgd(
            loss, theta, tasks.support_x, tasks.support_y,
            lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, create_graph=True,
        )  # fmt: skip
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.mean_tasks(tree.grad(query_loss.sum(), theta)), query_loss.detach())

    def _backwards(self, loss: TaskLoss, params: Params, tasks: TaskBatch) -> MetaGradient:
        steps = list[Params]()
        self.adapt(loss, params, tasks.support_x, tasks.support_y, watch=steps.append)
        phi = tree.detach(steps.pop())
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        v = tree.grad(query_loss.sum(), phi)
        del phi
        while steps:
            batch = inner.minibatch(tasks.support_x, tasks.support_y, self.inner_batch, len(steps) - 1)
            _, _, hessian = numerics.hessian(lambda weights: loss(weights, *batch), steps.pop())  # noqa: B023
            v = tree.axpy(-self.inner_lr, hessian(v), v)
            del hessian  # with the graph it holds, before the next one is made
        return MetaGradient(tree.mean_tasks(v), query_loss.detach())
