"""Leap against values derived by hand, finite differences of the path's length, and Reptile.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import math

import pytest
import torch
from torch import Tensor

from metalib import algorithms
from metalib.types import MetaLearner, Params, TaskBatch
from tests import problems

IN_TURN = [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 1, 2, 3]]  # six images, four in an inner step; the last ends the path

by_hand = TaskBatch(
    torch.tensor([[[3.0, 4.0], [4.0, -3.0]]]), torch.tensor([[6.0, -3.0]]), torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)
)


def leap(**choices: object) -> MetaLearner:
    common = {"inner_lr": 0.3, "inner_steps": 3, "inner_batch": None, "norm": True, "loss": True, "stabiliser": True}
    return algorithms.build("leap", common | choices)


def path(learner: MetaLearner, theta: Params, batch: TaskBatch) -> list[Params]:
    points: list[Params] = []
    learner.adapt(problems.smooth_loss, theta, batch.support_x, batch.support_y, points.append)
    return points


def joint_norm(params: Params) -> Tensor:
    """Of each task, over all its weights, (T,)."""
    return torch.cat([value.flatten(1) for value in params.values()], 1).norm(dim=1)


@pytest.mark.parametrize(("choices", "expected"), [
    ({"norm": False, "loss": False}, [19.0, -8.0]),
    ({"norm": True, "loss": False}, [1.4, 0.2]),
    ({"norm": False, "loss": True, "stabiliser": False}, [-4483.5, 3322.0]),
    ({"norm": False, "loss": True, "stabiliser": True}, [4521.5, -3338.0]),
    ({"norm": True, "loss": True, "stabiliser": True}, [
        25.5 / math.hypot(7.5, 5) + 4496 / math.hypot(280, 20), 34 / math.hypot(7.5, 5) - 3372 / math.hypot(280, 20),
    ]),
])  # fmt: skip
def test_two_steps_by_hand(choices: dict[str, bool], expected: list[float]) -> None:
    """L(w) = (w . x - y)^2 / 2, alpha = 1, one image a step: x = (3, 4), y = 6, then x = (4, -3), y = -3, then the first.

      from w = (1, 1):   residual 1,   L = 1/2, gradient (3, 4),     w = (-2, -3),   a way of 5
      from w = (-2, -3): residual 4,   L = 8,   gradient (16, -12),  w = (-18, 9),   a way of 20
      at w = (-18, 9):   residual -24, L = 288
    The slide's d = 5 + 20: its gradient is the sum of the unit vectors, (.6, .8) + (.8, -.6) = (1.4, .2); the energy's is
    theta - phi = (3, 4) + (16, -12) = (19, -8). With L the height rises by 7.5 and by 280, and the energy's is
      (1 - 7.5) (3, 4) + (1 - 280) (16, -12) = (-4483.5, 3322),
    stabilised (1 + 7.5) (3, 4) + (1 + 280) (16, -12) = (25.5, 34) + (4496, -3372); the length's has these divided by
    |(7.5, 5)| and |(280, 20)|.  Seen failing with K - 1 segments, with both ends of a segment on the same mini-batch, with
    the stabiliser's sign turned, with the stabiliser left on, and with the squared length for the length.
    """
    learner = leap(inner_lr=1.0, inner_steps=2, inner_batch=1, **choices)
    grads, query_loss = learner.meta_gradient(problems.line_loss, {"w": torch.tensor([1.0, 1.0])}, by_hand)
    assert grads["w"].tolist() == pytest.approx(expected, rel=1e-6)
    assert query_loss.tolist() == [0.5 * 18**2]


@pytest.mark.parametrize(("inner_batch", "order"), [(None, [[*range(6)]] * 4), (4, IN_TURN)])
@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_increments_are_the_derivative_of_the_length(
    norm: bool, loss: bool, inner_batch: int | None, order: list[list[int]]
) -> None:
    """Central differences of sum_i ||(theta^{i+1} - theta^i - d, L^{i+1} - L_i(theta^i + d))||^p at d = 0, next points frozen.

    The same d at every point, as every Jacobian d theta^i / d theta^0 is I; p = 1, or p = 2 and the factor 2 dropped.
    Seen failing with the loss term's sign turned, with a norm for each tensor, with the loss left out of the norm, with the
    gradient taken at the next point, and with both ends of a segment on the same mini-batch.
    """
    theta, batch = problems.smooth_problem()
    learner = leap(norm=norm, loss=loss, stabiliser=False, inner_batch=inner_batch)
    points = path(learner, theta, batch)
    sets = [(batch.support_x[:, images], batch.support_y[:, images]) for images in order]
    heights = [problems.smooth_loss(point, *images) for point, images in zip(points, sets, strict=True)]

    def length(shift: Params) -> float:
        total = torch.zeros(4, dtype=torch.float64)
        for i in range(3):
            here = {name: value + shift[name] for name, value in points[i].items()}
            square = joint_norm({name: points[i + 1][name] - value for name, value in here.items()}).square()
            if loss:
                square = square + (heights[i + 1] - problems.smooth_loss(here, *sets[i])).square()
            total = total + (square.sqrt() if norm else square / 2)
        return float(total.detach().mean())

    grads, _ = learner.meta_gradient(problems.smooth_loss, theta, batch)
    still = {name: torch.zeros_like(value) for name, value in theta.items()}
    for direction in problems.directions(theta):
        numeric = problems.slope(length, still, direction, step=1e-6)  # short: the way of a step is, too
        assert problems.inner_product(grads, direction) == pytest.approx(numeric, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("inner_batch", [None, 1])
def test_without_loss_and_norm_it_is_reptile(inner_batch: int | None) -> None:
    """theta - phi: to the bit on integers, where sums do not round, and closely on the smooth network.

    Seen failing with K - 1 segments, with the factor 2 of the energy, and with the sum over tasks.
    """
    plain = {"inner_batch": inner_batch, "norm": False, "loss": False, "inner_steps": 3}
    same = {"inner_batch": inner_batch, "inner_optimiser": "sgd", "moments": "reset", "inner_steps": 3}
    w = {"w": torch.tensor([1.0, 1.0])}
    ours, _ = leap(**plain, inner_lr=1.0).meta_gradient(problems.line_loss, w, by_hand)
    theirs, _ = algorithms.build("reptile", same | {"inner_lr": 1.0}).meta_gradient(problems.line_loss, w, by_hand)
    assert torch.equal(ours["w"], theirs["w"]) and ours["w"].abs().min() > 0
    theta, batch = problems.smooth_problem()
    ours, _ = leap(**plain).meta_gradient(problems.smooth_loss, theta, batch)
    theirs, _ = algorithms.build("reptile", same | {"inner_lr": 0.3}).meta_gradient(problems.smooth_loss, theta, batch)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 3.0])
def test_length_without_loss_is_the_sum_of_unit_gradients(alpha: float) -> None:
    """sum_i g_i / ||g_i||, the norm over all weights together: alpha is in the points alone, not in one step's.

    Seen failing with a norm for each tensor, with the energy for the length, and with a small number added to the length.
    """
    theta, batch = problems.smooth_problem()
    learner = leap(inner_lr=alpha, loss=False, inner_steps=3)
    expected = {name: torch.zeros_like(value) for name, value in theta.items()}
    for point in path(learner, theta, batch)[:3]:
        _, g = problems.losses_and_gradients(problems.smooth_loss, point, batch.support_x, batch.support_y)
        norm = joint_norm(g)
        for name, value in g.items():
            expected[name] += (value / norm.view(-1, *[1] * (value.ndim - 1))).mean(0)
    grads, _ = learner.meta_gradient(problems.smooth_loss, theta, batch)
    for name, value in grads.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    one, _ = leap(inner_lr=alpha, loss=False, inner_steps=1).meta_gradient(problems.smooth_loss, theta, problems.task(batch, 0))
    assert float(joint_norm({name: value.unsqueeze(0) for name, value in one.items()})) == pytest.approx(1.0, rel=1e-10)


def test_stabiliser_never_turns_the_gradient_round() -> None:
    """Increment i is (alpha + |dL|) g_i / norm with it, (alpha - dL) g_i / norm without: against g_i where L rises by more
    than alpha, which weights five times too large see to; where L falls the two are the same.

    Increments are differences of the meta-gradients of i + 1 and of i steps.
    Seen failing with the stabiliser never on, always on, and with |dL| for -|dL|.
    """
    theta, batch = problems.smooth_problem()
    theta = {name: 5 * value for name, value in theta.items()}
    against = falls = 0
    for t in range(4):
        one = problems.task(batch, t)
        points = path(leap(inner_steps=5), theta, one)
        losses, g = zip(
            *(problems.losses_and_gradients(problems.smooth_loss, point, one.support_x, one.support_y) for point in points),
            strict=True,
        )
        for stabiliser in (True, False):
            learners = [leap(inner_steps=k, stabiliser=stabiliser) for k in range(6)]
            totals = [learner.meta_gradient(problems.smooth_loss, theta, one).grads for learner in learners]
            for i in range(5):
                change = float(losses[i + 1] - losses[i])
                away = 0.3 + abs(change) if stabiliser else 0.3 - change
                factor = away / math.hypot(change, 0.3 * float(joint_norm(g[i])))
                for name, value in g[i].items():
                    torch.testing.assert_close(totals[i + 1][name] - totals[i][name], factor * value[0], rtol=1e-8, atol=1e-12)
                against += away < 0
                falls += change < 0
    assert against > 2 and falls > 2


@pytest.mark.parametrize(("loss", "expected"), [(True, 0.5 / 0.75**0.5), (False, 0.5 / 2**0.5)])
def test_a_step_of_no_length_adds_nothing(loss: bool, expected: float) -> None:
    """x = (1, 1), alpha = 1/2, w = (1, 1): of two tasks, y = 2 is solved, y = 1 will be after one step, exactly.

    Residual 1, gradient (1, 1), a way of (1/2, 1/2) along which L falls by 1/2: (1/2 + 1/2) (1, 1) / |(1/2, 1/2, 1/2)| with L,
    (1, 1) / |(1, 1)| without. The mean over the tasks is half of it.  Seen failing (NaN) with a plain division.
    """
    x = torch.ones(2, 1, 2, dtype=torch.float64)
    y = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    learner = leap(inner_lr=0.5, inner_steps=2, loss=loss)
    w = {"w": torch.ones(2, dtype=torch.float64)}
    grads, _ = learner.meta_gradient(problems.line_loss, w, TaskBatch(x, y, x, y))
    assert grads["w"].tolist() == pytest.approx([expected, expected], rel=1e-12)
