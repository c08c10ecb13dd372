"""ANIL against MAML, finite differences, and a plain loop on Conv4.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metalib import algorithms
from metalib.models.loss import Conv4Loss
from metalib.types import MetaLearner, Params
from tests import problems


def anil(steps: int) -> MetaLearner:
    return algorithms.build("anil", {"inner_lr": 0.4, "inner_steps": steps})


def test_the_body_stays_as_it_was() -> None:
    """And the head does not.  Seen failing with all weights adapted, and with none."""
    params, batch = problems.smooth_problem()
    phi = anil(3).adapt(problems.smooth_loss, params, batch.support_x, batch.support_y)
    for name, value in params.items():
        assert torch.equal(phi[name], value.expand(4, *value.shape)) == (not name.startswith("head."))


@pytest.mark.parametrize("steps", [1, 3])
def test_when_all_is_head_it_is_maml(steps: int) -> None:
    """To the bit, on a loss whose body hands the images on.

    Seen failing with create_graph=False, with the head's query loss at the initial weights, and with one inner step more.
    """

    class Head(problems.SmoothLoss):
        def body(self, params: Params, x: Tensor) -> Tensor:
            return x

    params, batch = problems.smooth_problem()
    head = {"head.weight": params["a"][:3], "head.bias": params["head.bias"]}
    grads, query_loss = anil(steps).meta_gradient(Head(), head, batch)
    maml = algorithms.build("maml", {"inner_lr": 0.4, "inner_steps": steps})
    expected, loss = maml.meta_gradient(Head(), head, batch)
    adapted = anil(steps).adapt(Head(), head, batch.support_x, batch.support_y)
    others = maml.adapt(Head(), head, batch.support_x, batch.support_y)
    assert torch.equal(query_loss, loss)
    for name in head:
        assert torch.equal(grads[name], expected[name]) and torch.equal(adapted[name], others[name])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_is_the_derivative_of_the_adapted_loss(steps: int) -> None:
    """Central differences in body and head, each alone.

    Seen failing with create_graph=False, with the support set's features cut loose, and with the query set's.
    """
    params, batch = problems.smooth_problem()
    grads, _ = anil(steps).meta_gradient(problems.smooth_loss, params, batch)
    for direction in problems.directions(params):
        for head in (False, True):
            along = {name: value * (name.startswith("head.") == head) for name, value in direction.items()}
            numeric = problems.slope(lambda p: problems.objective(anil(steps), problems.smooth_loss, p, batch), params, along)
            assert problems.inner_product(grads, along) == pytest.approx(numeric, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 7])
def test_the_body_is_evaluated_once_per_set(steps: int) -> None:
    """Whatever the inner steps.  Seen failing with the whole loss in the inner loop."""

    class Counted(problems.SmoothLoss):
        sets = 0

        def body(self, params: Params, x: Tensor) -> Tensor:
            self.sets += 1
            return super().body(params, x)

    params, batch = problems.smooth_problem()
    loss = Counted()
    anil(steps).meta_gradient(loss, params, batch)
    assert loss.sets == 2
    anil(steps).adapt(loss, params, batch.support_x, batch.support_y)
    assert loss.sets == 3


def test_batched_network_equals_a_loop_over_tasks() -> None:
    """Conv4 against everyday PyTorch in float64, task after task, the body computed anew in every step.

    Seen failing with create_graph=False, with the support set's features cut loose, and with batch norm over both sets at once.
    """
    net, params = problems.network()
    batch = problems.image_batch(tasks=2, way=5, shot=1, query=2)
    grads, query_loss = anil(3).meta_gradient(Conv4Loss(net), params, batch)
    expected = {name: torch.zeros_like(value) for name, value in params.items()}
    for t in range(2):
        theta = {name: value.detach().requires_grad_() for name, value in params.items()}
        phi = dict(theta)
        for _ in range(3):
            loss = F.cross_entropy(net.forward(phi, batch.support_x[t]), batch.support_y[t])
            for name, g in zip(
                ("head.weight", "head.bias"),
                torch.autograd.grad(loss, [phi["head.weight"], phi["head.bias"]], create_graph=True),
                strict=True,
            ):
                phi[name] = phi[name] - 0.4 * g
        loss = F.cross_entropy(net.forward(phi, batch.query_x[t]), batch.query_y[t])
        assert float(query_loss[t]) == pytest.approx(float(loss.detach()), rel=1e-11)
        for name, g in zip(expected, torch.autograd.grad(loss, list(theta.values())), strict=True):
            expected[name] += g / 2
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))
