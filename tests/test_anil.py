"""ANIL against MAML and finite differences. The loop over tasks is in tests/test_benchmarks.py.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch
from torch import Tensor

from metalib import algorithms
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


@pytest.mark.parametrize(("steps", "zero", "same"), [(1, True, True), (2, True, False), (1, False, False)])
def test_with_a_head_of_zero_one_step_of_maml_is_anil(steps: int, zero: bool, same: bool) -> None:
    """Through a head of zero no gradient reaches the body, so MAML's inner step moves the head alone: the adapted weights
    and the body's meta-gradient are ANIL's. Not so after a second step, nor for a head that has been learned; and the
    head's own meta-gradient is another, since it knows that a head that is not zero would let the body move.

    Seen failing with the body left out of the inner step.
    """
    params, batch = problems.smooth_problem()
    if zero:
        params |= {name: torch.zeros_like(value) for name, value in params.items() if name.startswith("head.")}
    maml = algorithms.build("maml", {"inner_lr": 0.4, "inner_steps": steps})
    adapted, grads = [], []
    for learner in (anil(steps), maml):
        adapted.append(learner.adapt(problems.smooth_loss, params, batch.support_x, batch.support_y))
        grads.append(learner.meta_gradient(problems.smooth_loss, params, batch).grads)
    assert close(*adapted, list(params)) == close(*grads, ["a", "b", "norm.weight"]) == same
    assert not close(*grads, ["head.weight"])


def close(found: Params, expected: Params, names: list[str]) -> bool:
    return all(torch.allclose(found[name], expected[name], rtol=1e-13, atol=1e-15) for name in names)


def test_a_whole_loss_is_refused_in_one_sentence() -> None:
    """And so are weights without a head. Seen failing with either check left out: AttributeError, KeyError."""
    params, batch = problems.smooth_problem()

    def whole(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return problems.smooth_loss(params, x, y)

    headless = {name.replace("head.", "last."): value for name, value in params.items()}
    for loss, weights, words in (
        (whole, params, r"the loss must come in two halves, body and head \(metalib.types.SplitLoss\), but it is whole"),
        (problems.smooth_loss, headless, "the names of the last layer's weights must begin with 'head.', got a, b, "),
    ):
        for learner, name in ((anil(1), "anil"), (problems.build("finetune"), "finetune")):
            with pytest.raises(ValueError, match=f"{name}: {words}"):
                learner.meta_gradient(loss, weights, batch)
        with pytest.raises(ValueError, match=f"anil: {words}"):
            anil(1).adapt(loss, weights, batch.support_x, batch.support_y)
