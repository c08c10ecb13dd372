"""What every learner keeps to, whatever it is: each test runs for every file of metalib/algorithms, and for variants."""

import pytest
import torch

from metalib import algorithms, tree
from metalib.types import TaskBatch
from tests import problems

every = pytest.mark.parametrize("name", problems.cases())


@every
def test_gradients_have_the_names_and_shapes_of_the_meta_parameters(name: str) -> None:
    params, batch = problems.smooth_problem()
    learner = problems.build(name)
    meta = learner.init(params)
    grads, query_loss = learner.meta_gradient(problems.smooth_loss, meta, batch)
    assert {k: v.shape for k, v in grads.items()} == {k: v.shape for k, v in meta.items()}
    assert query_loss.shape == (4,) and not query_loss.requires_grad
    assert all(v.isfinite().all() and not v.requires_grad for v in grads.values())


@every
def test_a_batch_is_the_mean_of_its_tasks(name: str) -> None:
    params, batch = problems.smooth_problem()
    learner = problems.build(name)
    meta = learner.init(params)
    grads, query_loss = learner.meta_gradient(problems.smooth_loss, meta, batch)
    alone = [learner.meta_gradient(problems.smooth_loss, meta, problems.task(batch, t)) for t in range(4)]
    for key, value in grads.items():
        torch.testing.assert_close(value, torch.stack([g[key] for g, _ in alone]).mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(query_loss, torch.cat([loss for _, loss in alone]), rtol=1e-10, atol=0)


@every
def test_replicas_are_as_many_calls(name: str) -> None:
    """Two sets of meta-parameters, each with tasks of its own, in one call.

    Seen failing with a mean over all tasks, and with the tasks of replicas interleaved in `tile`.
    """
    params, batch = problems.smooth_problem()
    learner = problems.build(name)
    metas = [learner.init(tree.scale(1 + 0.1 * r, params)) for r in range(2)]
    with tree.replicas(2):
        both = {k: torch.stack([meta[k] for meta in metas]) for k in metas[0]}
        grads, query_loss = learner.meta_gradient(problems.smooth_loss, both, batch, torch.tensor(0.05))
    for r, meta in enumerate(metas):
        own = TaskBatch(*(None if part is None else part[2 * r : 2 * r + 2] for part in batch))
        alone, loss = learner.meta_gradient(problems.smooth_loss, meta, own, torch.tensor(0.05))
        torch.testing.assert_close({k: v[r] for k, v in grads.items()}, alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(query_loss[2 * r : 2 * r + 2], loss, rtol=1e-10, atol=0)


@every
def test_inputs_stay_as_they_were_and_calls_repeat(name: str) -> None:
    params, batch = problems.smooth_problem()
    learner = problems.build(name)
    meta = learner.init(params)
    before = {k: v.clone() for k, v in meta.items()}
    first, _ = learner.meta_gradient(problems.smooth_loss, meta, batch)
    again, _ = learner.meta_gradient(problems.smooth_loss, meta, batch)
    for key in meta:
        assert torch.equal(meta[key], before[key]) and not meta[key].requires_grad
        assert torch.equal(first[key], again[key])


@every
def test_adapted_weights_are_cut_loose_and_watched(name: str) -> None:
    params, batch = problems.smooth_problem()
    learner = problems.build(name)
    seen = []
    phi = learner.adapt(problems.smooth_loss, learner.init(params), batch.support_x, batch.support_y, seen.append)
    assert all(phi[k].shape == (4, *v.shape) and phi[k].grad_fn is None for k, v in params.items())
    assert all(torch.equal(seen[-1][k], phi[k]) for k in params)
    assert all(torch.equal(seen[0][k], v.expand(4, *v.shape)) for k, v in params.items())


@every
def test_relabelled_classes_permute_the_head(name: str) -> None:
    params, batch = problems.smooth_problem()
    learner = problems.build(name)
    order = torch.tensor([2, 0, 1])  # class c becomes order[c], so row order[c] of the new head is row c of the old
    back = order.argsort()
    heads = ("head.weight", "head.bias")
    assert batch.classes is not None
    relabelled = TaskBatch(batch.support_x, order[batch.support_y], batch.query_x, order[batch.query_y], batch.classes[:, back])
    moved = {k: v[back] if k in heads else v for k, v in params.items()}
    grads, _ = learner.meta_gradient(problems.smooth_loss, learner.init(params), batch)
    others, _ = learner.meta_gradient(problems.smooth_loss, learner.init(moved), relabelled)
    for key in params:
        torch.testing.assert_close(others[key], grads[key][back] if key in heads else grads[key], rtol=1e-9, atol=1e-12)


@every
def test_a_task_that_diverges_does_not_touch_its_neighbours(name: str) -> None:
    params, batch = problems.smooth_problem()
    learner = problems.build(name)
    meta = learner.init(params)
    poisoned = batch.support_x.clone()
    poisoned[1] = torch.inf
    _, clean = learner.meta_gradient(problems.smooth_loss, meta, batch)
    _, loss = learner.meta_gradient(problems.smooth_loss, meta, TaskBatch(poisoned, *batch[1:]))
    torch.testing.assert_close(loss[[0, 2, 3]], clean[[0, 2, 3]], rtol=1e-12, atol=0)
    phi = learner.adapt(problems.smooth_loss, meta, poisoned, batch.support_y)
    stayed = torch.equal(phi["a"][1], meta["a"])  # as a line search has it stay
    assert stayed or not loss[1].isfinite()


@every
def test_float32_agrees_with_float64(name: str) -> None:
    grads = {}
    for dtype in (torch.float32, torch.float64):
        params, batch = problems.smooth_problem(dtype=dtype)
        learner = problems.build(name)
        grads[dtype], _ = learner.meta_gradient(problems.smooth_loss, learner.init(params), batch)
    for key, value in grads[torch.float64].items():
        torch.testing.assert_close(grads[torch.float32][key].double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", algorithms.names())
@pytest.mark.parametrize(("change", "complaint"), [
    ({"inner_lr": -0.1}, "inner_lr: Input should be greater than 0, got -0.1"),
    ({"inner_lr": 1e9}, "inner_lr: Input should be less than or equal to 100, got 1000000000.0"),
    ({"inner_steps": -1}, r"inner_steps: Input should be greater than (or equal to )?0, got -1"),
    ({"inner_lr": "fast"}, "inner_lr: Input should be a valid number"),
    ({"innner_lr": 0.1}, "innner_lr is not a parameter here"),
])  # fmt: skip
def test_bad_hyper_parameters_are_refused_by_name(name: str, change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        problems.build(name, **change)


@pytest.mark.parametrize("name", algorithms.names())
def test_a_missing_hyper_parameter_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="is missing"):
        algorithms.build(name, {})


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'mamel' is not one of anil, .*fomaml, .*maml, "):
        algorithms.build("mamel", {})
