"""The study update_contents: coefficients on a smooth loss, combinations against the library's learners, and the command."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metalib import algorithms, tree
from metalib.types import Params, TaskBatch
from studies.page import app as pages
from studies.update_contents import combinations, expansions
from studies.update_contents.__main__ import app
from tests import problems
from tests.conftest import Edit, Stage

PARAMS, TASKS = problems.smooth_problem(tasks=2)
X, Y = TASKS.support_x, TASKS.support_y  # two mini-batches of six images


def flat(params: Params) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def test_average_gradients() -> None:
    """AvgGradInner is half the gradient of ||AvgGrad||^2. Seen failing with H_i g_i of the same mini-batch."""
    leaves = tree.detach(PARAMS)
    mean = problems.smooth_loss(tree.tile(leaves, 2), X, Y).mean()
    expected = tree.grad(mean, leaves, create_graph=True)
    half = 0.5 * flat(expected).square().sum()
    average, inner_product = expansions.average_gradients(problems.smooth_loss, PARAMS, X, Y)
    assert torch.allclose(flat(average), flat(expected).detach())
    assert torch.allclose(flat(inner_product), flat(tree.grad(half, leaves)))


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", list(expansions.EXPECTED))
def test_coefficients_of_a_smooth_loss(name: str, k: int) -> None:
    """Seen failing with k inner steps for MAML and FOMAML, and with Reptile's update not divided by alpha."""
    average, inner_product = expansions.average_gradients(problems.smooth_loss, PARAMS, X, Y)
    found = []
    for alpha in (1e-4, 1e-5):
        update = expansions.expected_update(name, problems.smooth_loss, PARAMS, X, Y, k=k, alpha=alpha, chunk=3)
        found.append(expansions.coefficients(update, average, inner_product, alpha))
    first, second = expansions.EXPECTED[name](k)
    assert found[1].average == pytest.approx(first, rel=1e-6)
    assert found[1].inner == pytest.approx(second, rel=1e-3)
    assert found[1].residual < 1e-3
    assert found[1].residual == pytest.approx(found[0].residual / 10, rel=0.1, abs=1e-5)  # O(alpha^2) over O(alpha)


def test_the_chunk_changes_nothing() -> None:
    whole, parts = (
        expansions.expected_update("maml", problems.smooth_loss, PARAMS, X, Y, k=3, alpha=0.1, chunk=chunk)
        for chunk in (None, 3)
    )
    assert torch.allclose(flat(whole), flat(parts))


def test_combinations_are_the_learners() -> None:
    """The sum is Reptile's update, the last gradient FOMAML's, the first that of joint training; each replica has its own.

    Seen failing with the weights of the replicas exchanged, and with gradients taken at the initial weights.
    """
    lr, batch = 0.1, 3
    x, y = torch.cat([X, TASKS.query_x], 1), torch.cat([Y, TASKS.query_y], 1)  # twelve images: four mini-batches
    weights = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0.5, 0, 0.25, 0]], dtype=torch.float64)
    count = len(weights)
    tiled = TaskBatch(*(values.repeat(count, *[1] * (values.ndim - 1)) for values in (x, y, x, y)))
    with tree.replicas(count):
        learner = combinations.Combination(weights, lr, batch)
        params = tree.map_with(lambda v: v.expand(count, *v.shape), PARAMS)
        found = learner.meta_gradient(problems.smooth_loss, params, tiled).grads
    hyper = {"inner_lr": lr, "inner_batch": batch}
    reptile = algorithms.build("reptile", hyper | {"inner_steps": 4, "inner_optimiser": "sgd"})
    total = reptile.meta_gradient(problems.smooth_loss, PARAMS, TaskBatch(x, y, x, y)).grads
    fomaml = algorithms.build("fomaml", hyper | {"inner_steps": 3})
    before_last = TaskBatch(x[:, :-batch], y[:, :-batch], x[:, -batch:], y[:, -batch:])
    last = fomaml.meta_gradient(problems.smooth_loss, PARAMS, before_last).grads
    leaves = tree.detach(PARAMS)
    joint = tree.grad(problems.smooth_loss(tree.tile(leaves, 2), x[:, :batch], y[:, :batch]).mean(), leaves)
    for name, value in found.items():
        assert torch.allclose(value[0], total[name] / lr)
        assert torch.allclose(value[1], last[name])
        assert torch.allclose(value[2], joint[name])
        assert not torch.allclose(value[3], 0.5 * joint[name])
    adapted = learner.adapt(problems.smooth_loss, PARAMS, x, y)
    assert torch.allclose(flat(tree.sub(PARAMS, tree.mean_tasks(adapted))), flat(total))


SMALL = {
    "studies__update_contents__common__network__filters": 4,
    "studies__update_contents__common__coefficients__gradients": [2, 3],
    "studies__update_contents__quick__coefficients__alphas": [1e-3, 1e-8],
    "studies__update_contents__quick__coefficients__draws": 2,
    "studies__update_contents__common__combinations__shot": 1,
    "studies__update_contents__quick__combinations__meta_steps": 4,
    "studies__update_contents__quick__combinations__validations": 2,
    "studies__update_contents__quick__combinations__validation_tasks": 2,
    "studies__update_contents__common__combinations__test_steps": 1,
}


def test_the_study(data: None, edit: Edit, stage: Stage) -> None:
    """On a network with ReLUs the smallest alpha's coefficients are the slides' to a hundredth."""
    edit(**SMALL)
    said = stage(app)
    stage(pages, "update_contents")
    assert "(g1 + ... + g4)/4: meta-step 4" in said
    folder = Path("plots/studies/update_contents")
    with open(folder / "coefficients.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 and float(rows[0]["alpha"]) == 1e-8
    for row in rows[:6]:
        assert float(row["average"]) == pytest.approx(float(row["expected_average"]), rel=1e-3)
        assert float(row["inner"]) == pytest.approx(float(row["expected_inner"]), rel=1e-2)
    with open(folder / "learning_curves.csv", newline="") as file:
        curves = list(csv.DictReader(file))
    assert [row["combination"] for row in curves if row["step"] == "4"] == list(combinations.COMBINATIONS)
    assert {row["step"] for row in curves} == {"2", "4"}
    metrics = json.loads(Path("reports/studies/update_contents.metrics.json").read_text())
    last = {row["combination"]: float(row["accuracy"]) for row in curves}
    assert [metrics[f"accuracy_{name}"] for name in ("joint", "fomaml", "reptile")] == [
        last[name] for name in ("g1", "g4", "g1 + ... + g4")
    ]
    assert metrics["largest_deviation"] < 0.1
    page = Path("reports/studies/update_contents.md").read_text()
    assert "data glyphs" in page and "2 tasks of the validation characters" in page
    assert 10_000 < Path("reports/studies/update_contents.png").stat().st_size < 200_000


@pytest.mark.parametrize(("change", "sentence"), [
    ({"network__filter": 3}, "studies.update_contents.quick.network.filter is not a parameter here"),
    ({"coefficients__gradients": [1]}, "coefficients.gradients.0: Input should be greater than or equal to 2"),
    ({"combinations__shot": 6}, "shot + query: 24 images of a class, but each has only 20"),
    ({"combinations__inner_lr": 1e30}, "combinations.inner_lr: Input should be less than or equal to 10, got 1e+30"),
])  # fmt: skip
def test_bad_params_are_one_sentence(change: dict[str, object], sentence: str, data: None, edit: Edit, stage: Stage) -> None:
    common = {"studies__update_contents__common__coefficients__gradients": [2]}
    edit(**SMALL | common | {f"studies__update_contents__common__{key}": value for key, value in change.items()})
    assert sentence in stage(app, fails=True)


def test_without_tasks_it_says_what_to_run(edit: Edit, stage: Stage) -> None:
    edit()
    assert "dvc repro split@5w5s" in stage(app, fails=True)


def test_a_lost_loss_is_one_sentence(data: None, edit: Edit, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(**SMALL | {"studies__update_contents__common__coefficients__gradients": [2]})
    lost = lambda params, x, y: torch.nan * params["head.weight"].flatten(1).sum(1)  # noqa: E731
    monkeypatch.setattr(combinations, "Conv4Loss", lambda network: lost)
    said = stage(app, fails=True)
    assert "combinations: the query loss or the meta-gradient stopped being finite" in said and "lower inner_lr" in said
