"""Truncated MAML and MAML++ against MAML, closed forms on quadratics, values derived by hand, and finite differences.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch
from torch import Tensor

from metalib import algorithms
from metalib.types import MetaLearner, Params, TaskBatch
from tests import problems

# Truncated back-propagation


def gradient(name: str, params: Params, batch: TaskBatch, **chosen: float) -> Params:
    return algorithms.build(name, {"inner_lr": 0.3, "inner_steps": 3} | chosen).meta_gradient(
        problems.smooth_loss, params, batch
    )[0]


@pytest.mark.parametrize(("backprop_steps", "limit"), [(0, "fomaml"), (3, "maml"), (9, "maml")])
def test_truncated_limits_are_maml_and_fomaml(backprop_steps: int, limit: str) -> None:
    """To the bit: all steps, or more than there are, is MAML; none is FOMAML; between them lies something else.

    Seen failing with create_graph=False in the last steps, with backprop_steps counted from the first step, and with one step
    less differentiated.
    """
    params, batch = problems.smooth_problem()
    grads = gradient("maml_truncated", params, batch, backprop_steps=backprop_steps)
    expected = gradient(limit, params, batch)
    between = gradient("maml_truncated", params, batch, backprop_steps=1)
    for name, value in expected.items():
        assert torch.equal(grads[name], value)
        assert (between[name] - value).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "n"), [("maml", 4), *(("maml_truncated", n) for n in range(6))])
def test_product_form_on_quadratics(name: str, n: int) -> None:
    """L_A = (phi - b)' A (phi - b) / 2: every step's Jacobian is I - alpha A, so g = (I - alpha A)^n grad L_B(phi_4).

    phi_4 = b + (I - alpha A)^4 (theta - b). MAML has n = 4; truncated MAML n = backprop_steps, but 4 at most.
    Seen failing with create_graph=False, with backprop_steps taken for the steps that are not differentiated, and (n > 4)
    with backprop_steps inner steps instead of 4.
    """
    alpha, theta = 0.2, torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    (a, b), (qa, qb) = problems.quadratics(tasks=3, count=1), problems.quadratics(tasks=3, count=1, seed=1)
    chosen = {"inner_lr": alpha, "inner_steps": 4} | ({} if name == "maml" else {"backprop_steps": n})
    learner = algorithms.build(name, chosen)
    grads, query_loss = learner.meta_gradient(problems.mean_quadratic_loss, {"w": theta}, TaskBatch(a, b, qa, qb))
    step = torch.eye(3, dtype=torch.float64) - alpha * a[:, 0]
    power = torch.linalg.matrix_power
    phi = b[:, 0, :, None] + power(step, 4) @ (theta - b[:, 0]).unsqueeze(-1)
    away = phi - qb[:, 0, :, None]
    expected = power(step, min(n, 4)) @ qa[:, 0] @ away
    torch.testing.assert_close(grads["w"], expected.squeeze(-1).mean(0), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(query_loss, 0.5 * (away.mT @ qa[:, 0] @ away).flatten(), rtol=1e-11, atol=0)


def test_truncated_memory_does_not_grow_with_the_inner_steps() -> None:
    """But with those that are differentiated; MAML's grows with all of them.

    Seen failing with all inner steps differentiated and the graph cut afterwards.
    """
    params, batch = problems.smooth_problem()

    def most(name: str, steps: int, **chosen: int) -> int:
        learner = algorithms.build(name, {"inner_lr": 0.1, "inner_steps": steps} | chosen)
        return problems.peak_saved(lambda: learner.meta_gradient(problems.smooth_loss, params, batch))

    assert most("maml_truncated", 4, backprop_steps=2) == most("maml_truncated", 16, backprop_steps=2) > 0
    assert most("maml_truncated", 16, backprop_steps=8) > 1.5 * most("maml_truncated", 16, backprop_steps=2)
    assert most("maml", 16) > 2 * most("maml", 4)


# MAML++


def plus_plus(**chosen: float) -> MetaLearner:
    return algorithms.build("maml_plus_plus", {"inner_lr": 0.3, "inner_steps": 3, "msl": 0.2} | chosen)


def distinct(params: Params, learner: MetaLearner) -> Params:
    """Meta-parameters with other rates and batch norms in every step."""
    meta, random = learner.init(params), torch.Generator().manual_seed(6)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=random, dtype=value.dtype)
        if name.startswith(("rate.", "norm"))
        else value
        for name, value in meta.items()
    }


def outer_loss(meta: Params, batch: TaskBatch, weights: list[float]) -> float:
    """sum_k w_k L_B(phi_k), mean over tasks, as the paper has it.

    Batch norm k serves the gradient at phi_k and the query loss at phi_{k+1}.
    """
    phi = {n: v.expand(4, *v.shape) for n, v in meta.items() if not n.startswith(("rate.", "norm"))}
    total = 0.0
    for k, weight in enumerate(weights):
        norm = {"norm.weight": meta["norm.weight"][k].expand(4, -1)}
        _, g = problems.losses_and_gradients(problems.smooth_loss, phi | norm, batch.support_x, batch.support_y)
        phi = {name: value - meta["rate." + name][k] * g[name] for name, value in phi.items()}
        total += weight * float(problems.smooth_loss(phi | norm, batch.query_x, batch.query_y).mean())
    return total


@pytest.mark.parametrize(("progress", "weights"), [
    (0.1, [1 / 6, 1 / 6, 2 / 3]),  # half of the multi-step phase
    (1.0, [0.0, 0.0, 1.0]),
    (None, [0.0, 0.0, 1.0]),
])  # fmt: skip
def test_plus_plus_is_the_derivative_of_the_outer_loss(progress: float | None, weights: list[float]) -> None:
    """Central differences in weights, rates and batch norms, each alone; every step has its own rates and batch norm.

    Seen failing with the inner gradients or the rates cut loose, with batch norm cut loose in either loss, with the next step's
    batch norm for the query loss, with the first step's rates in every step, and with equal weights in the multi-step loss.
    """
    params, batch = problems.smooth_problem()
    learner = plus_plus()
    meta = distinct(params, learner)
    at = None if progress is None else torch.tensor(progress, dtype=torch.float64)
    grads, query_loss = learner.meta_gradient(problems.smooth_loss, meta, batch, at)
    assert float(query_loss.mean()) == pytest.approx(outer_loss(meta, batch, [0.0, 0.0, 1.0]), rel=1e-12)
    for direction in problems.directions(meta, count=3):
        for part in (("rate.",), ("norm",), ("a", "b", "head.")):
            along = {name: value * name.startswith(part) for name, value in direction.items()}
            numeric = problems.slope(lambda p: outer_loss(p, batch, weights), meta, along)
            assert problems.inner_product(grads, along) == pytest.approx(numeric, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("progress", "expected"), [
    (None, {"w": [144.0], "norm.n": [[48.0], [-120.0]], "rate.w": [-96.0, -108.0]}),
    (0.0, {"w": [-87.0], "norm.n": [[50.5], [-60.0]], "rate.w": [58.0, -54.0]}),
])  # fmt: skip
def test_plus_plus_by_hand(progress: float | None, expected: dict[str, list[object]]) -> None:
    """L(w, n) = (n w x - y)^2 / 2; w = 1, batch norms n = 2 and 3, rates 1; support x = 1, y = 3, query x = 1, y = -47.

    dL/dw = n r with r = n w - y on the support set:
      step 1, n = 2: r = -1, w_1 = 1 + 2 = 3,     dw_1/dw = 1 - n^2 = -3,    dw_1/dn = -(2 n w - y) = -1,     dw_1/da = 2
      step 2, n = 3: r = 6,  w_2 = 3 - 18 = -15,  dw_2/dw_1 = -8,            dw_2/dn = -(18 - 3) = -15,       dw_2/da = -18
    Query after step 1, n = 2: residual 53. After step 2, n = 3: -45 + 47 = 2, loss 2, dL/dw_2 = 6, dL/dn = 2 (-15 + 3 (-15)).
    Last loss alone: w 6 (-8) (-3) = 144, n 6 (-8) (-1) = 48 and -120, rates 6 (-8) 2 = -96 and 6 (-18) = -108.
    The first's: w 53 n (-3) = -318, n 53 (3 - 2) = 53, rate 53 n 2 = 212; at progress 0 the loss is the mean of both.
    Seen failing with the first step's batch norm in both, with the
    next step's for the query loss, and with batch norm adapted.
    """

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (params["norm.n"] * params["w"] * x - y).square().sum(1)

    one = torch.ones(1, 1)
    meta = {"w": torch.tensor([1.0]), "norm.n": torch.tensor([[2.0], [3.0]]), "rate.w": torch.tensor([1.0, 1.0])}
    at = None if progress is None else torch.tensor(progress)
    learner = plus_plus(inner_steps=2)
    grads, query_loss = learner.meta_gradient(loss, meta, TaskBatch(one, 3 * one, one, -47 * one), at)
    assert {name: value.tolist() for name, value in grads.items()} == expected
    assert query_loss.tolist() == [2.0]
    adapted = learner.adapt(loss, meta, one, 3 * one)
    assert adapted["w"].tolist() == [[-15.0]] and adapted["norm.n"].tolist() == [[3.0]]


def test_plus_plus_with_nothing_learned_is_maml() -> None:
    """The last loss alone, equal rates, equal batch norms: the weights' gradient is MAML's with batch norm not adapted.

    Seen failing with the inner gradients cut loose, with the sum over tasks, and with msl ignored.
    """
    params, batch = problems.smooth_problem()
    learner = plus_plus(msl=0.0)
    grads, query_loss = learner.meta_gradient(problems.smooth_loss, learner.init(params), batch, torch.tensor(0.0))
    norm = params["norm.weight"].expand(4, -1)
    expected, loss = algorithms.build("maml", {"inner_lr": 0.3, "inner_steps": 3}).meta_gradient(
        lambda p, x, y: problems.smooth_loss(p | {"norm.weight": norm}, x, y),
        {name: value for name, value in params.items() if name != "norm.weight"},
        batch,
    )
    torch.testing.assert_close(query_loss, loss, rtol=1e-12, atol=0)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("progress", "before", "last"), [
    (0.0, 0.2, 0.2), (0.1, 0.1, 0.6), (0.18, 0.02, 0.92), (0.199, 0.006, 0.976), (0.2, 0.0, 1.0), (1.0, 0.0, 1.0),
    (None, 0.0, 1.0),
])  # fmt: skip
def test_plus_plus_step_weights(progress: float | None, before: float, last: float) -> None:
    """K = 5, the authors' epochs 0, 5 and 9 of 10 with a multi-step loss, its floor 0.03/5 just before the end, and after it.

    Seen failing with a floor of 0.03, with no floor, and with K weights that fall.
    """
    like = torch.zeros(5, 4, dtype=torch.float64)
    at = None if progress is None else torch.tensor(progress, dtype=torch.float64)
    weights = plus_plus(inner_steps=5).step_weights(at, like)
    assert weights.tolist() == pytest.approx([before] * 4 + [last], abs=1e-12)
    assert weights.dtype == like.dtype


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("msl", [0.0, 0.3, 1.0])
def test_plus_plus_step_weights_sum_to_one(steps: int, msl: float) -> None:
    """And none is negative.  Seen failing with the last weight falling like the others."""
    learner = plus_plus(inner_steps=steps, msl=msl)
    for progress in torch.linspace(0, 1, 41, dtype=torch.float64):
        weights = learner.step_weights(progress, torch.zeros(1, dtype=torch.float64))
        assert weights.shape == (steps,) and weights.min() >= 0
        assert float(weights.sum()) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 5])
def test_plus_plus_keeps_to_the_steps_of_its_training(steps: int) -> None:
    """In one sentence, with fewer and with more.  Seen failing with the check left out, and with one for more steps alone."""
    params, batch = problems.smooth_problem()
    meta = plus_plus(inner_steps=3).init(params)
    with pytest.raises(ValueError) as refused:
        plus_plus(inner_steps=steps).adapt(problems.smooth_loss, meta, batch.support_x, batch.support_y)
    assert str(refused.value) == (
        f"maml_plus_plus.inner_steps: {steps}, but the meta-parameters are for 3 steps; test with as many steps as in training"
    )
