"""Reptile against values derived by hand, joint training, and torch's own Adam in plain loops.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch

from metalib import algorithms, training
from metalib.types import MetaLearner, Params, TaskBatch
from tests import problems

IN_TURN = [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]  # six images, four in an inner step


def reptile(**choices: object) -> MetaLearner:
    common = {"inner_lr": 0.3, "inner_steps": 3, "inner_batch": None, "inner_optimiser": "sgd", "moments": "reset"}
    return algorithms.build("reptile", common | choices)


def outer_sgd(learner: MetaLearner, meta: Params, batch: TaskBatch, lr: float) -> Params:
    """The meta-parameters after one meta-step of SGD."""
    outer = training.Outer(optimiser="sgd", lr=lr, schedule="constant", meta_steps=1, meta_batch=1, validations=1)
    optimiser = training.make_optimiser({name: value.unsqueeze(0) for name, value in meta.items()}, outer)
    training.meta_step(learner, problems.smooth_loss, batch, optimiser, torch.tensor(0.0), torch.tensor(1.0))
    return {name: value[0] for name, value in optimiser.params.items()}


def train_alone(
    optimiser: torch.optim.Adam, weights: Params, batch: TaskBatch, t: int, order: list[list[int]]
) -> dict[str, torch.Tensor]:
    """Steps of torch's optimiser on task t, each on the images that `order` says; a copy of the weights they lead to."""
    for images in order:
        optimiser.zero_grad()
        one = {name: value.unsqueeze(0) for name, value in weights.items()}
        problems.smooth_loss(one, batch.support_x[t : t + 1, images], batch.support_y[t : t + 1, images]).sum().backward()
        optimiser.step()
    return {name: value.detach().clone() for name, value in weights.items()}


@pytest.mark.parametrize(("steps", "inner_batch", "expected"), [
    (2, None, [1.0, -4.0]), (2, 1, [9.0, -3.0]), (3, 1, [8.0, -5.0]), (0, 1, [0.0, 0.0]),
])  # fmt: skip
def test_steps_by_hand(steps: int, inner_batch: int | None, expected: list[float]) -> None:
    """L(w) = sum (w . x - y)^2 / 2; images x = (1, 2), y = 1 and x = (1, -1), y = -5; alpha = 1, from w = (1, 1).

    Both images in every step:
      residuals 2 and 5,     gradient (7, -1),    w = (-6, 2)
      residuals -3 and -3,   gradient (-6, -3),   w = (0, 5),     theta - phi = (1, -4)
    One after the other:
      first:   residual 2,   gradient (2, 4),     w = (-1, -3)
      second:  residual 7,   gradient (7, -7),    w = (-8, 4),    theta - phi = (9, -3)
      first:   residual -1,  gradient (-1, -2),   w = (-7, 6),    theta - phi = (8, -5)
    The query x = (1, 0), y = 0 has no say in it.  Seen failing with phi - theta for theta - phi, with one step more, and with
    the first mini-batch in every step.
    """
    batch = TaskBatch(
        torch.tensor([[[1.0, 2.0], [1.0, -1.0]]]), torch.tensor([[1.0, -5.0]]), torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)
    )
    theta = {"w": torch.tensor([1.0, 1.0])}
    learner = reptile(inner_lr=1.0, inner_steps=steps, inner_batch=inner_batch)
    grads, query_loss = learner.meta_gradient(problems.line_loss, theta, batch)
    assert grads["w"].tolist() == expected
    assert query_loss.tolist() == [0.5 * (1 - expected[0]) ** 2]


def test_one_step_is_joint_training() -> None:
    """k = 1: alpha times the gradient of all tasks' images thrown together.

    Seen failing with two steps for one, and with the sum over tasks for the mean.
    """
    theta, batch = problems.smooth_problem()
    grads, _ = reptile(inner_steps=1).meta_gradient(problems.smooth_loss, theta, batch)
    pooled = batch.support_x.reshape(1, -1, 3), batch.support_y.reshape(1, -1)
    _, joint = problems.losses_and_gradients(problems.smooth_loss, {n: v.unsqueeze(0) for n, v in theta.items()}, *pooled)
    for name, value in grads.items():
        torch.testing.assert_close(value, 0.3 * joint[name][0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tasks", [1, 4])
@pytest.mark.parametrize("choices", [{}, {"inner_optimiser": "adam", "inner_lr": 0.02}])
def test_outer_sgd_is_the_step_of_the_slide(tasks: int, choices: dict[str, object]) -> None:
    """phi <- phi + eps (phi~ - phi), to the bit: serial with one task, with the mean of phi~ over several.

    Seen failing with the gradient divided by alpha, with its sign turned, and with the first task's phi~ for the mean.
    """
    theta, batch = problems.smooth_problem(tasks)
    learner = reptile(inner_batch=4, **choices)
    phi = learner.adapt(problems.smooth_loss, theta, batch.support_x, batch.support_y)
    moved = outer_sgd(learner, theta, batch, lr=0.25)
    for name, value in theta.items():
        assert torch.equal(moved[name], value + 0.25 * (phi[name].mean(0) - value))
        assert not torch.equal(moved[name], value)


@pytest.mark.parametrize(("inner_batch", "order"), [(None, [[*range(6)]] * 3), (4, IN_TURN)])
def test_adam_is_torchs(inner_batch: int | None, order: list[list[int]]) -> None:
    """torch.optim.Adam with beta1 = 0, fresh for every task, in a plain loop; images in turn, none twice before all were used.

    Seen failing with beta2 = 0.99, without the bias correction, with eps inside the root, and with mini-batches that start
    anew at the end of the set.
    """
    theta, batch = problems.smooth_problem()
    learner = reptile(inner_optimiser="adam", inner_lr=0.02, inner_batch=inner_batch)
    grads, _ = learner.meta_gradient(problems.smooth_loss, theta, batch)
    adapted = learner.adapt(problems.smooth_loss, theta, batch.support_x, batch.support_y)
    phi = []
    for t in range(4):
        weights = {name: value.clone().requires_grad_() for name, value in theta.items()}
        optimiser = torch.optim.Adam(weights.values(), lr=0.02, betas=(0.0, 0.999), eps=1e-8)
        phi.append(train_alone(optimiser, weights, batch, t, order))
    for name, value in theta.items():
        expected = torch.stack([p[name] for p in phi])
        torch.testing.assert_close(adapted[name] - value, expected - value, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(grads[name], value - expected.mean(0), rtol=1e-10, atol=1e-15)


def test_carried_moments_are_those_torchs_adam_ends_with() -> None:
    """One task a meta-step, outer SGD with rate 1: v and its weight become what the task's Adam ends with.

    The second task, its weights reset to theta, goes the way of a torch Adam that was not reset; a fresh one goes another.
    Seen failing with moments reset in every task, with the weight of v reset alone, and with v or
    its weight left out of the gradient.
    """
    theta, batch = problems.smooth_problem()
    learner = reptile(inner_optimiser="adam", inner_lr=0.02, inner_batch=4, moments="carried")
    meta = outer_sgd(learner, learner.init(theta), problems.task(batch, 0), lr=1.0)

    weights = {name: value.clone().requires_grad_() for name, value in theta.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=0.02, betas=(0.0, 0.999), eps=1e-8)
    first = train_alone(optimiser, weights, batch, 0, IN_TURN)
    assert float(meta["adam.weight"]) == pytest.approx(1 - 0.999**3, rel=1e-12)
    for name, value in first.items():
        torch.testing.assert_close(meta[name], value, rtol=1e-12, atol=1e-15)
        squares = optimiser.state[weights[name]]["exp_avg_sq"]
        torch.testing.assert_close(meta["adam." + name], squares, rtol=1e-11, atol=1e-18)

    with torch.no_grad():
        for name, value in theta.items():
            weights[name].copy_(value)
    second = train_alone(optimiser, weights, batch, 1, IN_TURN)
    alone = batch.support_x[1:2], batch.support_y[1:2]
    adapted = learner.adapt(problems.smooth_loss, meta | theta, *alone)
    fresh = learner.adapt(problems.smooth_loss, learner.init(theta), *alone)
    assert adapted.keys() == theta.keys()
    for name, value in second.items():
        torch.testing.assert_close(adapted[name][0] - theta[name], value - theta[name], rtol=1e-10, atol=1e-15)
        assert (fresh[name][0] - value).abs().max() > 1e-4
