"""Implicit MAML (Rajeswaran, Finn, Kakade, Levine, NeurIPS 2019, https://arxiv.org/abs/1909.04630).

Slides "iMAML": the inner problem is proximal, and the meta-gradient depends on its solution alone, not on the way there:

    phi = argmin_phi  L_A(phi) + lam/2 ||phi - theta||^2,      g = (I + H/lam)^-1 grad L_B(phi),   H the Hessian of L_A at phi.

(The slides write mu and epsilon for lam in places, and grad L-hat for the gradient of the test loss.) The inverse is applied by
`cg_steps` steps of conjugate gradient or of the Neumann series, on Hessian-vector products: memory is flat in inner steps.
cg_steps 0 is the first-order limit of the slides' summary, g = grad L_B(phi).

The released code (github.com/aravindr93/imaml_dev) solves something else: `proximal: last`, `damping: 1`, `lam_damping: 10` is
its inner loop (plain descent, then one proximal step) and its matrix, (1 + damping) I + H/(lam + lam_damping), whose gradient
is half as large and close to first order; it tests with `lam: 0`.
"""

from typing import Literal

from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, numerics, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class IMAML:
    inner_lr: inner.Rate  # alpha
    inner_steps: NonNegativeInt  # k
    inner_optimiser: Literal["sgd", "nesterov"]
    proximal: Literal["each", "last"]  # in which inner steps theta pulls
    lam: NonNegativeFloat  # lambda; 0 only in a test
    solver: Literal["cg", "neumann"]
    cg_steps: NonNegativeInt  # Hessian-vector products of the solver
    damping: NonNegativeFloat  # added to I
    lam_damping: NonNegativeFloat  # added to lambda in the matrix only

    @model_validator(mode="after")
    def _rates_and_pulls_fit_together(self) -> "IMAML":
        if self.inner_optimiser == "nesterov" and self.proximal == "last":
            raise ValueError("proximal: last needs inner_optimiser sgd")
        if self.inner_optimiser == "nesterov" and not 0 < self.inner_lr * self.lam <= 1:
            raise ValueError("inner_optimiser: nesterov wants inner_lr * lam above 0 and at most 1")
        if self.proximal == "each" and self.inner_lr * self.lam > 2:  # theta's pull alone: away <- (1 - inner_lr lam) away
            raise ValueError("inner_lr * lam must be at most 2, or the proximal term by itself makes the inner steps diverge")
        return self

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        if self.inner_optimiser == "nesterov":
            return inner.nesterov(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, lam=self.lam, watch=watch)
        lam = self.lam if self.proximal == "each" else 0.0
        phi = inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, lam=lam, watch=watch)
        if self.proximal == "last" and self.lam:
            phi = tree.detach(tree.axpy(self.inner_lr * self.lam, tree.sub(theta, phi), phi))
            if watch:
                watch(phi)
        return phi

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        if not self.lam:
            raise ValueError("imaml.lam: 0 leaves no proximal problem to differentiate; give a positive value for training")
        phi = self.adapt(loss, params, tasks.support_x, tasks.support_y)
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        grads = tree.grad(query_loss.sum(), phi)
        if self.cg_steps:
            _, _, hvp = numerics.hessian(lambda p: loss(p, tasks.support_x, tasks.support_y), phi)
            lam = self.lam + self.lam_damping
            if self.solver == "cg":
                matvec = lambda v: tree.axpy(1 / lam, hvp(v), tree.scale(1 + self.damping, v))  # noqa: E731
                grads = numerics.cg(matvec, grads, self.cg_steps)
            else:  # lam (shift I + H)^-1, at a rate at which the series converges wherever gradient descent on G does
                shift = lam * (1 + self.damping)
                rate = self.inner_lr / (1 + self.inner_lr * (shift - self.lam))
                matvec = lambda v: tree.axpy(shift, v, hvp(v))  # noqa: E731
                grads = tree.scale(lam, numerics.neumann(matvec, grads, self.cg_steps, rate))
        return MetaGradient(tree.mean_tasks(grads), query_loss.detach())
