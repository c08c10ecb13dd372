"""Joint pre-training and training from scratch, against everyday PyTorch in plain loops.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metalib import algorithms
from metalib.types import Params, TaskBatch
from tests import problems

finetune = algorithms.build("finetune", {"inner_lr": 0.3, "inner_steps": 3, "classes": 48})
scratch = algorithms.build("scratch", {"inner_lr": 0.3, "inner_steps": 3})


def logits(params: Params, x: Tensor, head: str = "head.") -> Tensor:
    """The network of `smooth_loss` on one task's images (B, 3)."""
    features = torch.tanh(F.linear(x, params["a"], params["b"])) * params["norm.weight"]
    return F.linear(features, params[head + "weight"], params[head + "bias"])


def with_joint_head(params: Params) -> Params:
    """Meta-parameters whose joint head is no special case."""
    random = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(value.shape, generator=random, dtype=value.dtype) if name.startswith("joint.") else value
        for name, value in finetune.init(params).items()
    }


def descended(params: Params, x: Tensor, y: Tensor) -> Params:
    """Three steps of SGD on one task, alpha = 0.3."""
    phi = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimiser = torch.optim.SGD(phi.values(), lr=0.3)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(logits(phi, x), y).backward()
        optimiser.step()
    return {name: value.detach() for name, value in phi.items()}


def test_joint_gradient_is_that_of_one_classifier() -> None:
    """torch's cross-entropy over all 48 classes, of both sets of every task; the sets weigh the same, whatever their sizes.

    The classes' order in a task is mixed and two tasks share one. The head for tasks gets no gradient.
    Seen failing with labels for classes, with the support set alone, with the query set's labels for both sets, and with the
    head's gradient for the joint head's.
    """
    params, batch = problems.smooth_problem()
    classes = torch.tensor([[44, 3, 17], [5, 0, 2], [17, 30, 9], [8, 25, 40]])
    batch = TaskBatch(batch.support_x[:, :3], batch.support_y[:, :3], batch.query_x, batch.query_y.flip(1), classes)
    meta = with_joint_head(params)
    grads, query_loss = finetune.meta_gradient(problems.smooth_loss, meta, batch)
    leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for t in range(4):
        halves = []
        for x, y in ((batch.support_x[t], batch.support_y[t]), (batch.query_x[t], batch.query_y[t])):
            targets = torch.tensor([int(classes[t, label]) for label in y])
            halves.append(F.cross_entropy(logits(leaves, x, "joint.head."), targets))
        assert float(query_loss[t]) == pytest.approx(float(sum(halves).detach()) / 2, rel=1e-12)
        total = total + sum(halves) / 8
    total.backward()
    for name, value in grads.items():
        if name.startswith("head."):
            assert not value.any()
        else:
            torch.testing.assert_close(value, leaves[name].grad, rtol=1e-11, atol=1e-14)
            assert value.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["finetune", "scratch"])
def test_adaptation_is_plain_sgd(name: str) -> None:
    """torch's SGD, task by task, from the same weights; the joint head is not looked at.

    Seen failing with one step more, with a step of half the rate, and (finetune) with the joint head's first rows for the head.
    """
    params, batch = problems.smooth_problem()
    learner, meta = (finetune, with_joint_head(params)) if name == "finetune" else (scratch, params)
    phi = learner.adapt(problems.smooth_loss, meta, batch.support_x, batch.support_y)
    assert phi.keys() == params.keys()
    for t in range(4):
        for key, value in descended(params, batch.support_x[t], batch.support_y[t]).items():
            torch.testing.assert_close(phi[key][t], value, rtol=1e-12, atol=1e-14)


def test_tasks_without_classes_are_refused() -> None:
    """Seen failing with the check left out."""
    params, batch = problems.smooth_problem()
    with pytest.raises(ValueError, match=r"^finetune: the tasks do not say which classes their labels stand for.*trained$"):
        finetune.meta_gradient(problems.smooth_loss, finetune.init(params), batch._replace(classes=None))


def test_scratch_learns_nothing_and_says_how_it_does() -> None:
    """Gradient 0; the query loss is that after plain SGD.

    Seen failing with FOMAML's gradient, and with the query loss at the initial weights.
    """
    params, batch = problems.smooth_problem()
    grads, query_loss = scratch.meta_gradient(problems.smooth_loss, params, batch)
    assert all(not value.any() for value in grads.values())
    for t in range(4):
        phi = descended(params, batch.support_x[t], batch.support_y[t])
        assert float(query_loss[t]) == pytest.approx(float(F.cross_entropy(logits(phi, batch.query_x[t]), batch.query_y[t])))
