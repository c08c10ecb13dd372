"""Implicit MAML with a Hessian-free inner solver (Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630, "iMAML, HF").

Slides "iMAML": the meta-gradient asks only for the solution phi of the proximal problem

    G(phi) = L_A(phi) + lam/2 ||phi - theta||^2,

so the inner solver need not be differentiable. Here it is Newton-CG with line search (Martens 2010; Nocedal and Wright,
algorithm 7.1): each inner step solves (H + lam I) d = -grad G by `cg_steps` steps of conjugate gradient, which stop at
negative curvature, and backtracks along d until G falls enough (Armijo). The meta-gradient is imaml.py's,

    g = (I + H/lam)^-1 grad L_B(phi),      with imaml.py's two dampings.

The authors never released theirs; of its settings only lam = 2 and 5 CG steps are published.
"""

import torch
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, numerics, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class IMAMLHessianFree:
    inner_lr: inner.Rate  # the first step length the line search tries; 1 is Newton's
    inner_steps: NonNegativeInt  # Newton directions
    lam: PositiveFloat  # lambda
    cg_steps: PositiveInt  # Hessian-vector products of each direction, and of the meta-gradient
    damping: NonNegativeFloat  # added to I in the meta-gradient only
    lam_damping: NonNegativeFloat  # added to lambda in the meta-gradient's matrix only
    halvings: NonNegativeInt  # of the step length, at most

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.detach(tree.tile(params, len(x)))

        def objective(phi: Params) -> Tensor:
            away = tree.sub(phi, theta)
            return loss(phi, x, y) + 0.5 * self.lam * tree.dot(away, away)

        phi = theta
        if watch:
            watch(phi)
        for _ in range(self.inner_steps):
            value, grads, hvp = numerics.hessian(lambda p: loss(p, x, y), phi)
            with torch.no_grad():
                away = tree.sub(phi, theta)
                value = value + 0.5 * self.lam * tree.dot(away, away)
                grads = tree.axpy(self.lam, away, grads)
            downhill = tree.scale(-1.0, grads)
            direction = numerics.cg(lambda v: tree.axpy(self.lam, v, hvp(v)), downhill, self.cg_steps)  # noqa: B023, F821
            del hvp  # and its graph, before the next one is built
            with torch.no_grad():
                slope = tree.dot(grads, direction)
                phi, _ = numerics.armijo(objective, phi, value, slope, direction, self.inner_lr, self.halvings)
            phi = tree.detach(phi)
            if watch:
                watch(phi)
        return phi

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        phi = self.adapt(loss, params, tasks.support_x, tasks.support_y)
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        grads = tree.grad(query_loss.sum(), phi)
        _, _, hvp = numerics.hessian(lambda p: loss(p, tasks.support_x, tasks.support_y), phi)
        lam = self.lam + self.lam_damping
        grads = numerics.cg(lambda v: tree.axpy(1 / lam, hvp(v), tree.scale(1 + self.damping, v)), grads, self.cg_steps)
        return MetaGradient(tree.mean_tasks(grads), query_loss.detach())
