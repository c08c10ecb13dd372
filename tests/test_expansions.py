"""The slides' expansions of the expected gradients in alpha, by enumeration.

With g_bar, H_bar taken at theta, mini-batches drawn independently, AvgGrad = E[g_bar] and AvgGradInner = E[H_bar_2 g_bar_1]:

    E[g_MAML]    =    AvgGrad -      2 (k - 1) alpha AvgGradInner + O(alpha^2)
    E[g_FOMAML]  =    AvgGrad -        (k - 1) alpha AvgGradInner + O(alpha^2)
    E[g_Reptile] =  k AvgGrad - 1/2 k (k - 1) alpha AvgGradInner + O(alpha^2)

MAML takes k - 1 inner steps, mini-batch k is its query set; Reptile takes k steps, and its g is (theta - phi) / alpha. Three
quadratics are the mini-batches, all 3^k sequences of them the tasks: their mean is the expectation, nothing is sampled.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from metalib import algorithms
from metalib.types import TaskBatch
from tests import problems

THETA = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
A, b = (part[0] for part in problems.quadratics(tasks=1, count=3))


def expected_gradient(name: str, k: int, alpha: float) -> Tensor:
    """The mean over all sequences of k mini-batches, from the learner itself."""
    order = torch.tensor(list(itertools.product(range(3), repeat=k)))
    x, y, theta = A[order], b[order], {"w": THETA}
    hyper = {"inner_lr": alpha, "inner_batch": 1}
    if name == "reptile":
        learner = algorithms.build(name, hyper | {"inner_steps": k, "inner_optimiser": "sgd"})
        return learner.meta_gradient(problems.mean_quadratic_loss, theta, TaskBatch(x, y, x, y)).grads["w"] / alpha
    learner = algorithms.build(name, hyper | {"inner_steps": k - 1})
    tasks = TaskBatch(x[:, :-1], y[:, :-1], x[:, -1:], y[:, -1:])
    return learner.meta_gradient(problems.mean_quadratic_loss, theta, tasks).grads["w"]


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile"])
def test_expected_gradient_to_first_order(name: str, k: int) -> None:
    """The residual falls with alpha^2; with k = 2, FOMAML's and Reptile's is 0: phi_2 is linear in alpha, so are g_1, g_2.

    Seen failing with create_graph=False in maml.py, with fomaml.py's gradient taken at the initial weights, with one step
    more in reptile.py, with MAML's gradient for FOMAML's, with half the rate in inner.sgd, and with MAML's and FOMAML's
    coefficients exchanged.
    """
    average = (A @ (THETA - b).unsqueeze(-1)).squeeze(-1).mean(0)
    inner_product = A.mean(0) @ average  # E[H_2 g_1] of independent draws
    zeroth, first = {"maml": (1, 2 * (k - 1)), "fomaml": (1, k - 1), "reptile": (k, k * (k - 1) / 2)}[name]
    alphas = (1e-2, 5e-3)
    residuals = [
        float((expected_gradient(name, k, alpha) - zeroth * average + first * alpha * inner_product).norm()) for alpha in alphas
    ]
    if k == 2 and name != "maml":
        assert max(residuals) < 1e-12
    else:
        assert residuals[0] > 1e-6
        assert math.log(residuals[0] / residuals[1]) / math.log(2) == pytest.approx(2.0, abs=0.03)
