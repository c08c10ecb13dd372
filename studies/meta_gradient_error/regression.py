"""Linear regression with a meta-gradient in closed form, and the meta-gradients that MAML and implicit MAML compute on it.

Slide "Complexity" (iMAML; Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630, table 1 and figure 2). Each task has the
support loss L_A(phi) = ||X phi - y||^2 / 2n, a query loss L_B of the same form, and the inner problem

    phi* = argmin_phi  G(phi),   G(phi) = L_A(phi) + lam/2 ||phi - theta||^2,      phi* = (H + lam I)^-1 (X'y/n + lam theta),

with H = X'X/n. The eigenvalues of H + lam I are log-spaced from lam to kappa lam, so kappa is the inner problem's condition
number. The exact meta-gradient is that of L_B(phi*) with respect to theta:

    g* = (I + H/lam)^-1 grad L_B(phi*).

All methods minimise G from theta at the rate 1/(kappa lam), by gradient descent or by Nesterov's accelerated descent.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metalib import algorithms, tree
from metalib.types import Params, TaskBatch, TaskLoss


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Half the mean squared error of y = w . x. w (T, d), x (T, n, d), y (T, n) -> (T,): a TaskLoss."""
    return 0.5 * (torch.bmm(x, params["w"].unsqueeze(2)).squeeze(2) - y).square().mean(1)


class Problem(NamedTuple):
    """T tasks, each with initial weights of its own, float64."""

    theta: Tensor  # (T, d)
    tasks: TaskBatch  # support and query x (T, n, d), y (T, n)
    kappa: float  # condition number of the inner problem
    lam: float
    exact: Tensor  # g* of each task, (T, d)


def problem(*, kappa: float, lam: float, tasks: int, size: int, random: torch.Generator) -> Problem:
    """Tasks of `size` weights and as many images; eigenvectors, labels and initial weights are random."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    eigenvalues = lam * (kappa ** torch.linspace(0, 1, size, dtype=torch.float64) - 1)  # of H
    left, _ = torch.linalg.qr(normal(tasks, size, size))
    right, _ = torch.linalg.qr(normal(tasks, size, size))
    x = left * (size * eigenvalues).sqrt() @ right.mT
    theta, y = normal(tasks, size), normal(tasks, size)
    query_x, query_y = normal(tasks, size, size), normal(tasks, size)
    inner_hessian = x.mT @ x / size + lam * torch.eye(size, dtype=torch.float64)
    phi = torch.linalg.solve(inner_hessian, (x.mT @ y.unsqueeze(2)).squeeze(2) / size + lam * theta)
    query_gradient = (query_x.mT @ (query_x @ phi.unsqueeze(2) - query_y.unsqueeze(2))).squeeze(2) / size
    exact = lam * torch.linalg.solve(inner_hessian, query_gradient)
    return Problem(theta, TaskBatch(x, y, query_x, query_y), kappa, lam, exact)


@dataclass(frozen=True)
class Method:
    """How the meta-gradient is computed."""

    learner: Literal["maml", "imaml"]  # back through the inner steps, or by the implicit function theorem
    descent: Literal["gd", "nesterov"]
    steps: int  # inner steps
    limit: int  # maml: how many of the last steps are differentiated, at least 1 and at most `steps`; imaml: CG steps

    @property
    def products(self) -> int:
        """Gradients of the support loss plus Hessian-vector products with it; the query gradient is not counted.

        An inner step takes a gradient. A differentiated one takes a Hessian-vector product as well, unless it starts from
        weights that count as constant. iMAML takes one more gradient at its solution, and a product for each CG step.
        """
        if self.learner == "imaml":
            return self.steps + 1 + self.limit
        return self.steps + (self.limit - 1 if self.limit < self.steps else self.steps)


def meta_gradient(method: Method, on: Problem) -> Tensor:
    """The method's meta-gradient of each task, (T, d).

    Computed by the library's learners where they can: it has no MAML through Nesterov's descent, and its truncated MAML takes
    a plain loss, where theta does not act in every step.
    """
    rate = 1 / (on.kappa * on.lam)
    objective: TaskLoss = loss
    if method.learner == "imaml":
        learner = algorithms.build("imaml", {
            "inner_lr": rate, "inner_steps": method.steps, "proximal": "each", "lam": on.lam,
            "inner_optimiser": "sgd" if method.descent == "gd" else "nesterov",
            "solver": "cg", "cg_steps": method.limit,
            "damping": 0.0, "lam_damping": 0.0,  # the exact inverse
        })  # fmt: skip
    elif method.descent == "gd" and method.limit >= method.steps:
        learner = algorithms.build("maml", {"inner_lr": rate, "inner_steps": method.steps, "inner_batch": None})
        objective = Proximal(on.lam, on.tasks.query_x)
    else:
        momentum = 0.0 if method.descent == "gd" else (on.kappa**0.5 - 1) / (on.kappa**0.5 + 1)
        return _through_last_steps(on, rate=rate, momentum=momentum, steps=method.steps, through=method.limit)
    with tree.replicas(len(on.theta)):  # a replica for each task keeps the tasks' gradients apart
        return learner.meta_gradient(objective, {"w": on.theta}, on.tasks).grads["w"]


class Proximal:
    """G for MAML, which has no proximal term: theta is the weights of the first call, still attached to the graph.

    Good for a single meta-gradient. The query loss, recognised by its images `query_x`, stays L_B.
    """

    def __init__(self, lam: float, query_x: Tensor) -> None:
        self.lam = lam
        self.query_x = query_x
        self.theta: Params | None = None

    def __call__(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        if x is self.query_x:
            return loss(params, x, y)
        if self.theta is None:
            self.theta = params
        away = tree.sub(params, self.theta)
        return loss(params, x, y) + 0.5 * self.lam * tree.dot(away, away)


def _through_last_steps(on: Problem, *, rate: float, momentum: float, steps: int, through: int) -> Tensor:
    """MAML's meta-gradient through descent with momentum, of which the last `through` steps are differentiated, (T, d).

    theta acts in every differentiated step, as the centre of the proximal term. The weights that the first of these steps
    starts from count as constant unless they are theta (Shaban et al. 2019, https://arxiv.org/abs/1810.10667).
    """
    theta = {"w": on.theta.detach().requires_grad_()}
    phi = before = theta
    for step in range(steps):
        if 0 < step <= steps - through:
            phi, before = tree.detach(phi), tree.detach(before)
        ahead = tree.axpy(momentum, tree.sub(phi, before), phi)
        support_loss = loss(ahead, on.tasks.support_x, on.tasks.support_y)
        grads = tree.grad(support_loss.sum(), ahead, create_graph=step >= steps - through)
        grads = tree.axpy(on.lam, tree.sub(ahead, theta), grads)
        before, phi = phi, tree.axpy(-rate, grads, ahead)
    return tree.grad(loss(phi, on.tasks.query_x, on.tasks.query_y).sum(), theta)["w"]


def error(method: Method, on: Problem) -> float:
    """||g - g*|| / ||g*||, geometric mean over tasks."""
    away = (meta_gradient(method, on) - on.exact).norm(dim=1) / on.exact.norm(dim=1)
    return float(away.log().mean().exp())
