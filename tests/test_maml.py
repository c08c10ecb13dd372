"""MAML and first-order MAML: values by hand and finite differences. The loop over tasks is in tests/test_benchmarks.py.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch

from metalib import algorithms
from metalib.models.loss import Conv4Loss
from metalib.types import TaskBatch
from tests import problems


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [("maml", {}, [2.0, 7.0]), ("maml", {"recompute": True}, [2.0, 7.0]), ("fomaml", {}, [-1.0, 1.0])],
)
def test_two_steps_by_hand(name: str, chosen: dict[str, bool], expected: list[float]) -> None:
    """L(w) = (w . x - y)^2 / 2, gradient (w . x - y) x, Hessian x x'.

    Support x = (1, 2), y = 1, alpha = 1, from w = (1, 1):
      step 1: residual 1 + 2 - 1 = 2,     w = (1, 1) - 2 (1, 2) = (-1, -3)
      step 2: residual -1 - 6 - 1 = -8,   w = (-1, -3) + 8 (1, 2) = (7, 13)
    Query x = (1, -1), y = -5: residual 7 - 13 + 5 = -1, gradient -1 (1, -1) = (-1, 1), which is FOMAML's.
    One step's Jacobian I - x x' = [[0, -2], [-2, -3]], squared [[4, 6], [6, 13]]; times (-1, 1): (2, 7), MAML's.
    Loss 1/2.  Seen failing with create_graph=False in maml.py, with fomaml.py's gradient taken at the initial weights, and
    with one inner step for two.
    """
    batch = TaskBatch(
        torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0]]), torch.tensor([[[1.0, -1.0]]]), torch.tensor([[-5.0]])
    )
    learner = algorithms.build(name, {"inner_lr": 1.0, "inner_steps": 2} | chosen)
    params = {"w": torch.tensor([1.0, 1.0])}
    grads, query_loss = learner.meta_gradient(problems.line_loss, params, batch)
    assert grads["w"].tolist() == expected
    assert query_loss.tolist() == [0.5]
    adapted = learner.adapt(problems.line_loss, params, batch.support_x, batch.support_y)
    assert adapted["w"].tolist() == [[7.0, 13.0]]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_maml_is_the_derivative_of_the_adapted_loss(steps: int) -> None:
    """Central differences of the query loss after adaptation, in float64, on a smooth network.

    Seen failing with create_graph=False in maml.py.
    """
    params, batch = problems.smooth_problem()
    learner = algorithms.build("maml", {"inner_lr": 0.3, "inner_steps": steps})
    grads, query_loss = learner.meta_gradient(problems.smooth_loss, params, batch)
    assert float(query_loss.mean()) == pytest.approx(
        problems.objective(learner, problems.smooth_loss, params, batch), rel=1e-12
    )
    for direction in problems.directions(params):
        numeric = problems.slope(lambda p: problems.objective(learner, problems.smooth_loss, p, batch), params, direction)
        assert problems.inner_product(grads, direction) == pytest.approx(numeric, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_recomputed_gradient_is_the_same(steps: int) -> None:
    """On Conv4 by both ways, in float64, with the memory of one step.

    Seen failing with the steps taken forwards, and with one Hessian at phi_k for all.
    """
    net, params = problems.network()
    batch = problems.image_batch(tasks=2, way=3, shot=1, query=2)
    found, expected = (
        algorithms.build("maml", {"inner_lr": 0.4, "inner_steps": steps, "recompute": again}).meta_gradient(
            Conv4Loss(net), params, batch
        )
        for again in (True, False)
    )
    torch.testing.assert_close(found.query_loss, expected.query_loss, rtol=1e-12, atol=0)
    for key, value in expected.grads.items():
        torch.testing.assert_close(found.grads[key], value, rtol=1e-9, atol=1e-10 * float(value.abs().max()))


@pytest.mark.parametrize("steps", [1, 3])
def test_fomaml_is_the_query_gradient_at_the_adapted_weights(steps: int) -> None:
    """Central differences of each task's query loss about its own adapted weights, moved together.

    Seen failing with the gradient taken at the initial weights; MAML's gradient differs from it.
    """
    params, batch = problems.smooth_problem()
    learner = algorithms.build("fomaml", {"inner_lr": 0.3, "inner_steps": steps})
    phi = learner.adapt(problems.smooth_loss, params, batch.support_x, batch.support_y)
    grads, _ = learner.meta_gradient(problems.smooth_loss, params, batch)
    maml, _ = algorithms.build("maml", {"inner_lr": 0.3, "inner_steps": steps}).meta_gradient(
        problems.smooth_loss, params, batch
    )
    for direction in problems.directions(params):
        numeric = problems.slope(
            lambda p: float(problems.smooth_loss(p, batch.query_x, batch.query_y).detach().mean()), phi, direction
        )
        assert problems.inner_product(grads, direction) == pytest.approx(numeric, rel=1e-7)
        assert problems.inner_product(maml, direction) != pytest.approx(numeric, rel=1e-3)


@pytest.mark.parametrize(("name", "chosen"), [("maml", {}), ("maml", {"recompute": True}), ("fomaml", {})])
def test_inner_batches_go_round_the_support_set(name: str, chosen: dict[str, bool]) -> None:
    """Three steps on four of six images each: 0-3, then 4, 5, 0, 1, then 2-5, against a loop with these written out.

    Seen failing with the whole set in every step of adapt, of meta_gradient, and of _backwards, and with _backwards taking
    the batch of the step after.
    """
    params, batch = problems.smooth_problem()
    learner = algorithms.build(name, {"inner_lr": 0.3, "inner_steps": 3, "inner_batch": 4} | chosen)
    theta = {key: value.expand(4, *value.shape).clone().requires_grad_() for key, value in params.items()}
    phi = theta
    for images in ([0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]):
        loss = problems.smooth_loss(phi, batch.support_x[:, images], batch.support_y[:, images]).sum()
        steps = torch.autograd.grad(loss, list(phi.values()), create_graph=name == "maml")
        phi = {key: value - 0.3 * g for (key, value), g in zip(phi.items(), steps, strict=True)}
    query_loss = problems.smooth_loss(phi, batch.query_x, batch.query_y)
    expected = torch.autograd.grad(query_loss.sum(), list(theta.values()))
    adapted = learner.adapt(problems.smooth_loss, params, batch.support_x, batch.support_y)
    grads, found = learner.meta_gradient(problems.smooth_loss, params, batch)
    torch.testing.assert_close(adapted, {key: value.detach() for key, value in phi.items()}, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, query_loss.detach(), rtol=1e-12, atol=0)
    for value, g in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(value, g.mean(0), rtol=1e-10, atol=1e-12)
