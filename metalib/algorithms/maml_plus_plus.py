"""MAML++: How to train your MAML (Antoniou, Edwards, Storkey, ICLR 2019, https://arxiv.org/abs/1810.09502).

MAML, exact, with three of the paper's additions that are the learner's own (the cosine schedule is the outer loop's):

- LSLR: a learned rate for every weight tensor and inner step, phi_{k+1} = phi_k - a_{k,w} grad_w L_A(phi_k);
- per-step batch norm (BNWB): scale and shift are meta-learned for each inner step and not adapted; those of step k serve the
  gradient at phi_k and the query loss at phi_{k+1}. Statistics are always the batch's, as in the released code;
- multi-step loss (MSL): the outer loss is sum_k w_k L_B(phi_k), k = 1..K. All w_k start as 1/K; over the first `msl` of
  meta-training those before the last fall linearly, not below 0.03/K, and are 0 afterwards; the last has the rest.
"""

import torch
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch

RATE = "rate."  # prefix of the meta-parameters that are rates, (K,) each
NORM = "norm"  # prefix of batch norm's weights, (K, *shape) each


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MAMLPlusPlus:
    inner_lr: inner.Rate  # what every rate starts from
    inner_steps: PositiveInt  # K, the same in training and test
    msl: float = Field(ge=0, le=1)  # the fraction of meta-training with a multi-step loss

    def init(self, params: Params) -> Params:
        rates = {RATE + n: v.new_full((self.inner_steps,), self.inner_lr) for n, v in tree.without(params, NORM).items()}
        norms = {n: v.expand(self.inner_steps, *v.shape).clone() for n, v in tree.part(params, NORM).items()}
        return params | norms | rates

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        steps = self._descend(loss, tree.detach(tree.tile(params, len(x))), x, y, create_graph=False)
        for phi in steps:
            if watch:
                watch(phi)
        return tree.detach(steps[-1])

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        theta = tree.detach(tree.tile(params, len(tasks.support_x)))
        _, *steps = self._descend(loss, theta, tasks.support_x, tasks.support_y, create_graph=True)
        losses = torch.stack([loss(phi, tasks.query_x, tasks.query_y) for phi in steps])  # (K, T)
        outer = self.step_weights(progress, losses) @ losses
        return MetaGradient(tree.mean_tasks(tree.grad(outer.sum(), theta)), losses[-1].detach())

    def step_weights(self, progress: Tensor | None, like: Tensor) -> Tensor:
        """The weights w_1..w_K of the multi-step loss, (K,), at this point of meta-training; without one, at its end."""
        k = self.inner_steps
        if progress is None or self.msl == 0:
            before = like.new_zeros(())
        else:
            falling = ((1 - progress / self.msl) / k).clamp_min(0.03 / k)
            before = torch.where(progress < self.msl, falling, 0).to(like.dtype)
        return torch.cat([before.expand(k - 1), (1 - (k - 1) * before).view(1)])

    def _descend(self, loss: TaskLoss, theta: Params, x: Tensor, y: Tensor, *, create_graph: bool) -> list[Params]:
        """Meta-parameters (T, *shape) -> the weights (T, *shape) that classify queries after 0, 1, ..., K steps."""
        norms = tree.part(theta, NORM)
        trained = next(iter(tree.part(theta, RATE).values())).shape[1]
        if trained != self.inner_steps:
            raise ValueError(
                f"maml_plus_plus.inner_steps: {self.inner_steps}, but the meta-parameters are for {trained} steps; "
                "test with as many steps as in training"
            )
        phi = tree.without(theta, NORM, RATE)
        steps = [phi | {name: value[:, 0] for name, value in norms.items()}]
        for k in range(self.inner_steps):
            norm = {name: value[:, k] for name, value in norms.items()}
            grads = tree.grad(loss(phi | norm, x, y).sum(), phi, create_graph)
            phi = {n: value - tree.per_task(theta[RATE + n][:, k], value) * grads[n] for n, value in phi.items()}
            if not create_graph:
                phi = tree.detach(phi)
            steps.append(phi | norm)
        return steps
