"""Meta-SGD against values derived by hand, MAML, its closed form for one step, and finite differences.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch

from metalib import algorithms
from metalib.types import Params, TaskBatch
from tests import problems


def unequal_rates(params: Params) -> Params:
    """Rates of either sign."""
    random = torch.Generator().manual_seed(5)
    return {"rate." + n: 0.2 + 0.2 * torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in params.items()}


def test_one_step_by_hand() -> None:
    """L(w) = (w . x - y)^2 / 2; support x = (1, 2), y = 1; rates a = (1, 1/4), from w = (1, 1).

    Residual 2, gradient g_A = (2, 4), phi = (1 - 2, 1 - 1) = (-1, 0). Query x = (1, -1), y = -5: residual 4, g_B = (4, -4).
    d/da = -g_B o g_A = (-8, 16). d phi / d w = I - diag(a) x x', transposed times g_B: g_B - x (x . (a o g_B)) =
    (4, -4) - (1, 2) (4 - 2) = (2, -8).  Seen failing with create_graph=False, and with one rate for the whole tensor.
    """
    batch = TaskBatch(
        torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0]]), torch.tensor([[[1.0, -1.0]]]), torch.tensor([[-5.0]])
    )
    meta = {"w": torch.tensor([1.0, 1.0]), "rate.w": torch.tensor([1.0, 0.25])}
    grads, query_loss = algorithms.build("meta_sgd", {"inner_lr": 9.0, "inner_steps": 1}).meta_gradient(
        problems.line_loss, meta, batch
    )
    assert grads["w"].tolist() == [2.0, -8.0]
    assert grads["rate.w"].tolist() == [-8.0, 16.0]
    assert query_loss.tolist() == [8.0]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_with_equal_rates_the_weights_gradient_is_mamls(steps: int) -> None:
    """Seen failing with create_graph=False, and with rates that start from half of inner_lr."""
    params, batch = problems.smooth_problem()
    chosen = {"inner_lr": 0.3, "inner_steps": steps}
    learner = algorithms.build("meta_sgd", chosen)
    meta = learner.init(params)
    grads, query_loss = learner.meta_gradient(problems.smooth_loss, meta, batch)
    expected, loss = algorithms.build("maml", chosen).meta_gradient(problems.smooth_loss, params, batch)
    torch.testing.assert_close(query_loss, loss, rtol=1e-12, atol=0)
    assert all(meta["rate." + name].shape == value.shape for name, value in params.items())
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-11, atol=1e-14)


def test_one_steps_gradient_of_the_rates() -> None:
    """d/da = -grad L_B(phi) o grad L_A(theta), the mean over tasks.

    Seen failing with the step's sign turned, with the rates cut loose, and with the sum over tasks for the mean.
    """
    params, batch = problems.smooth_problem()
    meta = params | unequal_rates(params)
    grads, _ = algorithms.build("meta_sgd", {"inner_lr": 9.0, "inner_steps": 1}).meta_gradient(
        problems.smooth_loss, meta, batch
    )
    theta = {name: value.expand(4, *value.shape) for name, value in params.items()}
    _, before = problems.losses_and_gradients(problems.smooth_loss, theta, batch.support_x, batch.support_y)
    phi = {name: value - meta["rate." + name] * before[name] for name, value in theta.items()}
    _, after = problems.losses_and_gradients(problems.smooth_loss, phi, batch.query_x, batch.query_y)
    for name in params:
        torch.testing.assert_close(grads["rate." + name], -(after[name] * before[name]).mean(0), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_derivative_of_the_adapted_loss(steps: int) -> None:
    """Central differences of the query loss after adaptation, in weights and rates, each alone.

    Seen failing with create_graph=False, with the rates cut loose, and with the weights cut loose at every step.
    """
    params, batch = problems.smooth_problem()
    learner = algorithms.build("meta_sgd", {"inner_lr": 9.0, "inner_steps": steps})
    meta = params | unequal_rates(params)
    grads, _ = learner.meta_gradient(problems.smooth_loss, meta, batch)
    for direction in problems.directions(meta):
        for rates in (False, True):
            along = {name: value * (name.startswith("rate.") == rates) for name, value in direction.items()}
            numeric = problems.slope(lambda p: problems.objective(learner, problems.smooth_loss, p, batch), meta, along)
            assert problems.inner_product(grads, along) == pytest.approx(numeric, rel=1e-7, abs=1e-9)
