"""Leap's comparison: every part of it against something simpler."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from metalib import tree
from metalib.checkpoint import Checkpoint
from metalib.data.omniglot import Characters
from metalib.models.loss import Conv4Loss
from metalib.randomness import generator
from metalib.types import Params, TaskBatch
from stages import params
from studies.leap_comparison import curves, figure, methods, summary, tasks
from studies.leap_comparison.__main__ import app
from studies.leap_comparison.schema import Augmentation, Comparison, LeapChoices, OuterRates
from studies.page import app as pages
from tests.conftest import ROOT, Edit, Stage
from tests.problems import network
from tests.test_training import OnlyMeta

STILL = Augmentation(degrees=0, shift=0, smallest=1, largest=1)
SMALL = Comparison(
    seeds=[3, 5], alphabets=[1, 2], test_alphabets=2, way=3, held_out_images=5, augmentation=STILL, downsample="stride",
    filters=4, inner_batch=4, inner_steps=4, maml_steps=2, inner_lr=0.1,
    outer_lr=OuterRates(leap=0.1, reptile=0.1, fomaml=0.5, maml=0.5),
    leap=LeapChoices(norm=True, loss=True, stabiliser=True),
    meta_steps=2, meta_batch=3, measure_every=2, window=2,
)  # fmt: skip


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawings(characters: int = 24, size: int = 16) -> torch.Tensor:
    return (torch.rand(characters, 20, size, size, generator=random()) < 0.2).to(torch.uint8) * 255


def asked(budget: str = "paper") -> Comparison:
    file = params.read()
    section = file.studies["leap_comparison"].model_copy(update={"budget": budget})
    return params.study(file.model_copy(update={"studies": {"x": section}}), "x", Comparison)


# ------------------------------------------------------------------------------------------------ data


def test_both_budgets_have_the_published_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own after random.seed(6534); quick has the first of them."""
    import random as python

    monkeypatch.chdir(ROOT)
    python.seed(6534)
    published = [python.randint(0, 10_000) for _ in range(10)]  # not a secret
    assert asked("paper").seeds == published
    quick = asked("quick")
    assert quick.seeds == published[: len(quick.seeds)]


def test_alphabets_are_split_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 alphabets, four of them too small, as in Omniglot. A task is of one alphabet, no alphabet is in two tasks.

    Seen failing with alphabets of equal name in both archives taken for one.
    """
    sizes = [14, 14, 16, 17] + [20] * 16 + [31] * 30
    names = np.repeat([f"a{i % 49}" for i in range(50)], sizes)  # the last has the first one's name
    background = np.repeat([i < 30 for i in range(50)], sizes)
    data = Characters(np.zeros((len(names), 20, 1, 1), np.uint8), names, names, background, "omniglot", "")
    monkeypatch.chdir(ROOT)
    rows = tasks.tasks_in_order(data, asked(), random())
    assert rows.shape == (46, 20)
    members = [{(bool(background[i]), str(names[i])) for i in row} for row in rows.tolist()]
    assert all(len(one) == 1 for one in members) and len(set.union(*members)) == 46
    assert all(len(set(row)) == 20 for row in rows.tolist())
    assert (rows != tasks.tasks_in_order(data, asked(), random(1))).any()
    with pytest.raises(ValueError, match="47 alphabets of at least 20 characters are needed"):
        tasks.tasks_in_order(data, dataclasses.replace(asked(), test_alphabets=22), random())


def test_draws_are_even_and_keep_what_is_held_out() -> None:
    """An image tells its character and drawer by its brightness. Seen failing with drawers counted from 0."""
    images = torch.arange(12 * 20).view(12, 20, 1, 1).to(torch.uint8).expand(12, 20, 2, 2)
    classes = torch.tensor([[7, 2, 11], [0, 1, 4]])
    x, y = tasks.draw(images, classes, range(5, 20), 100, STILL, random())
    assert x.shape == (2, 100, 1, 2, 2) and y.shape == (2, 100)
    number = (255 * x[:, :, 0, 0, 0]).round().long()
    assert (number // 20 == classes.gather(1, y)).all()
    assert (number % 20 >= 5).all()
    for row in number:  # 100 draws of 45 images
        assert sorted(set(row.unique(return_counts=True)[1].tolist())) == [2, 3]
    x, y = tasks.draw(images, classes, range(5), 15, STILL, random())
    assert all(len(row.unique()) == 15 for row in (255 * x[:, :, 0, 0, 0]).round().long())


def test_tasks_of_a_meta_step_are_spread_over_the_alphabets() -> None:
    """More tasks than alphabets: every alphabet as often as any other; fewer: none twice."""
    classes = [torch.arange(6).view(2, 3), torch.arange(6, 24).view(6, 3)[:5]]
    wide = dataclasses.replace(SMALL, meta_batch=4)
    batch, which = tasks.meta_batch(drawings(), classes, wide, 3, [random(), random(1)])
    assert batch.support_x.shape == (8, 12, 1, 16, 16) and batch.query_x.shape == (8, 4, 1, 16, 16)
    assert sorted(which[:4].tolist()) == [0, 0, 1, 1] and len(set(which[4:].tolist())) == 4


# ------------------------------------------------------------------------------------------------ augmentation


def test_nothing_is_done_to_an_image_by_zero_ranges() -> None:
    x = torch.rand(5, 28, 28, generator=random())
    assert torch.allclose(tasks.augment(x, STILL, random()), x, atol=1e-5)


def test_quarter_turns_and_whole_pixels() -> None:
    """Seen failing with shifts that are not doubled."""
    x = torch.rand(1, 28, 28, generator=random(), dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for k in range(4):
        assert torch.allclose(tasks.warp(x, k * math.pi / 2 * one, one, zero, zero), x.rot90(-k, (1, 2)), atol=1e-9)
    moved = tasks.warp(x, zero, one, 3 / 28 * one, -2 / 28 * one)  # three to the right, two up
    assert torch.allclose(moved[0, :-2, 3:], x[0, 2:, :-3], atol=1e-9)
    assert moved[0, -2:].abs().max() < 1e-9 and moved[0, :, :3].abs().max() < 1e-9


def test_warp_is_scipys_affine_transform() -> None:
    """Turned, scaled and moved at once. Seen failing with the shift applied before the turn."""
    image = torch.rand(28, 28, generator=random(), dtype=torch.float64)
    for angle, factor, right, down in [(0.7, 1.0, 0.0, 0.0), (2.5, 0.8, 0.2, -0.1), (5.9, 1.2, -0.15, 0.2)]:
        ours = tasks.warp(image[None], *(torch.tensor([v], dtype=torch.float64) for v in (angle, factor, right, down)))[0]
        turned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # (row, column), clockwise
        back, centre = np.linalg.inv(factor * turned), np.array([13.5, 13.5])
        offset = centre - back @ (centre + 28 * np.array([down, right]))
        theirs = ndimage.affine_transform(image.numpy(), back, offset, order=1, mode="grid-constant")
        assert np.allclose(ours.numpy(), theirs, atol=1e-9)


def test_augmentation_stays_within_its_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """And fills them. Seen failing with images moved to the right alone."""
    seen = []
    monkeypatch.setattr(tasks, "warp", lambda x, *amounts: seen.append(amounts))
    tasks.augment(torch.zeros(4000, 1, 1), Augmentation(degrees=90, shift=0.2, smallest=0.8, largest=1.2), random())
    for values, low, high in zip(seen[0], (0, 0.8, -0.2, -0.2), (math.pi / 2, 1.2, 0.2, 0.2), strict=True):
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high


# ------------------------------------------------------------------------------------------------ meta-training


@pytest.mark.parametrize("method", ["leap", "reptile", "fomaml", "maml"])
def test_learners_have_a_batch_for_every_inner_step(method: str) -> None:
    """Meta-training draws as many images as the inner steps take, and one batch of queries."""
    learner = methods.learner(method, SMALL)
    steps = methods.training_steps(method, SMALL)
    assert (learner.inner_steps, learner.inner_batch) == (steps, 4)
    batch, _ = tasks.meta_batch(drawings(), [torch.arange(6).view(2, 3)], SMALL, steps, [random()])
    assert batch.support_x.shape[1] == 4 * steps and batch.query_x.shape[1] == 4


def test_a_joint_step_is_one_of_everyday_sgd() -> None:
    """Two seeds, three heads each, the network in everyday PyTorch. Seen failing with head 0 for every batch."""
    net, weights = network(way=3, filters=4, image_size=16)
    both = {name: torch.stack([value, 1.1 * value]) for name, value in weights.items()}
    heads = {n: torch.stack([torch.stack([h * v for h in (1, 2, 3)]) for v in both[n]]) for n in both if n.startswith("head.")}
    body = {name: value.clone() for name, value in both.items() if name not in heads}
    x = torch.rand(2, 6, 1, 16, 16, generator=random(), dtype=torch.float64)
    y = torch.arange(3).repeat(2).expand(2, -1)
    which = torch.tensor([2, 1])
    before, heads_before = tree.map_with(torch.clone, body), tree.map_with(torch.clone, heads)
    losses = methods.joint_step(Conv4Loss(net), body, heads, which, x, y, 0.5)
    for r, head in enumerate(which.tolist()):
        leaves = {name: value[r].clone().requires_grad_() for name, value in before.items()}
        leaves |= {name: value[r, head].clone().requires_grad_() for name, value in heads_before.items()}
        loss = F.cross_entropy(net.forward(leaves, x[r]), y[r])
        loss.backward()
        assert float(losses[r]) == pytest.approx(float(loss.detach()))
        for name, leaf in leaves.items():
            got = body[name][r] if name in body else heads[name][r, head]
            assert torch.allclose(got, (leaf - 0.5 * leaf.grad).detach(), atol=1e-10), name
        for name, value in heads.items():  # the other heads stay as they were
            others = [h for h in range(3) if h != head]
            assert torch.equal(value[r, others], heads_before[name][r, others])


def run(method: str, seeds: list[int], asked: Comparison = SMALL, checkpoint: Checkpoint | None = None) -> Params:
    net = methods.make_network(asked, 16)
    classes = [torch.arange(24).view(8, 3)[seed : seed + 2] for seed in seeds]
    draws, weights = ([generator(seed, purpose) for seed in seeds] for purpose in ("draws", "weights"))
    return methods.meta_train(method, asked, net, drawings(), classes, draws, weights, checkpoint)


@pytest.mark.parametrize("method", methods.METHODS)
def test_seeds_trained_together_are_as_trained_alone(method: str) -> None:
    """To rounding, which learning enlarges. Meta-training moves all weights; joint training but those of a new task's head.

    Seen failing with one order of batches for all seeds in joint training, and with a trained head for the new task.
    """
    together, start = run(method, SMALL.seeds), run("none", SMALL.seeds)
    for r, seed in enumerate(SMALL.seeds):
        alone = run(method, [seed])
        assert all(torch.allclose(together[name][r], alone[name][0], atol=1e-3) for name in together)
    moved = {name for name in together if not torch.equal(together[name], start[name])}
    kept = {"none": set(together), "finetune": {"head.weight", "head.bias"}}.get(method, set())
    assert moved == set(together) - kept


def test_joint_training_never_waits_for_the_host() -> None:
    """On the `meta` device, where any look at a value raises. Seen failing with a step's row taken as order[done]."""
    net = methods.make_network(SMALL, 16)
    params = {name: value.to("meta").expand(2, *value.shape).clone() for name, value in net.init(random()).items()}
    own = {name: value.unsqueeze(1).repeat(1, 3, *[1] * (value.ndim - 1)) for name, value in tree.part(params, "head.").items()}
    classes = [torch.empty(3, SMALL.way, dtype=torch.int64, device="meta")] * 2
    images = drawings().to("meta")
    joint = methods.Joint(SMALL, Conv4Loss(net), params | own, images, classes, [random(), random(1)])
    with OnlyMeta():
        joint.draw()
        first = joint.drawn
        joint.sgd()
        joint.draw()
        joint.sgd()
    assert len(first) == 4 and joint.drawn is first  # where a recorded step looks for the images


@pytest.mark.parametrize("method", ["leap", "finetune"])
@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_stopped_meta_training_ends_as_it_would_have(
    method: str, killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit. Seen failing with a checkpoint at the end alone."""
    checkpoint, asked = tmp_path / "kept.pt", dataclasses.replace(SMALL, meta_steps=4)
    whole = run(method, SMALL.seeds, asked)
    plain, left = tasks.meta_batch, killed_after

    def draw(*arguments: object) -> object:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(methods, "meta_batch", draw)
    with pytest.raises(KeyboardInterrupt):
        run(method, SMALL.seeds, asked, Checkpoint(checkpoint))
    left = 4 - killed_after
    again = run(method, SMALL.seeds, asked, Checkpoint(checkpoint))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize(("method", "remedy"), [("maml", "lower inner_lr or outer_lr.maml"), ("finetune", "lower inner_lr")])
def test_a_lost_loss_names_method_and_seed(monkeypatch: pytest.MonkeyPatch, method: str, remedy: str) -> None:
    """The second seed's images hold no numbers."""
    plain = tasks.meta_batch

    def spoilt(*arguments: object) -> tuple[TaskBatch, torch.Tensor]:
        batch, which = plain(*arguments)  # type: ignore[arg-type]
        batch.support_x[SMALL.meta_batch :] = float("nan")
        return batch, which

    monkeypatch.setattr(methods, "meta_batch", spoilt)
    with pytest.raises(ValueError, match=rf"^{method}, 2 meta-training alphabet\(s\), seed 5: .*; {remedy}$"):
        run(method, SMALL.seeds)


def test_initial_weights_are_pytorchs_own() -> None:
    """The same bounds as of torch.nn, on many weights."""
    net = methods.make_network(dataclasses.replace(SMALL, filters=64), 28)
    ours = methods.initial(net, random())
    layers = {"conv1": torch.nn.Conv2d(1, 64, 3), "conv2": torch.nn.Conv2d(64, 64, 3), "head": torch.nn.Linear(256, 3)}
    for name, layer in layers.items():
        mine, theirs = ours[f"{name}.weight"], layer.weight.detach()
        assert mine.numel() == theirs.numel() and float(mine.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.05)
        assert float(mine.std()) == pytest.approx(float(theirs.std()), rel=0.1)
    assert 0 < float(ours["head.bias"].abs().max()) <= 1 / 16


# ------------------------------------------------------------------------------------------------ learning curves


def test_learning_curves_against_a_plain_loop() -> None:
    """SGD in everyday PyTorch, task by task: what is recorded, when, and of which images.

    Seen failing with the batch of the step before recorded, and with held-out images looked at one step late.
    """
    net = methods.make_network(SMALL, 16)
    classes = [torch.arange(24).view(8, 3)[r : r + 2] for r in range(2)]
    batch = tasks.test_tasks(drawings(), classes, SMALL, [random(), random(1)])
    assert batch.support_x.shape == (4, 16, 1, 16, 16) and batch.query_x.shape == (4, 15, 1, 16, 16)
    batch = TaskBatch(batch.support_x.double(), batch.support_y, batch.query_x.double(), batch.query_y)
    start = {name: value.double() for name, value in run("none", SMALL.seeds).items()}
    found = curves.learn(SMALL, net, start, batch)
    assert found.loss.shape == (4, 2, 2) and found.held_out_error.shape == (3, 2, 2)

    def measured(phi: Params, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
        logits = net.forward(phi, x)
        return F.cross_entropy(logits, y), float((logits.argmax(1) != y).double().mean())

    for t in range(4):
        r, place = divmod(t, 2)
        phi = {name: value[r].clone() for name, value in start.items()}
        for step in range(5):
            phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
            if step % 2 == 0:
                loss, error = measured(phi, batch.query_x[t], batch.query_y[t])
                assert float(found.held_out_loss[step // 2, r, place]) == pytest.approx(float(loss.detach()), rel=1e-9)
                assert float(found.held_out_error[step // 2, r, place]) == pytest.approx(error)
            if step < 4:
                rows = slice(4 * step, 4 * step + 4)
                loss, error = measured(phi, batch.support_x[t, rows], batch.support_y[t, rows])
                assert float(found.loss[step, r, place]) == pytest.approx(float(loss.detach()), rel=1e-9)
                assert float(found.error[step, r, place]) == pytest.approx(error)
                grads = torch.autograd.grad(loss, list(phi.values()))
                phi = {n: v - 0.1 * g for (n, v), g in zip(phi.items(), grads, strict=True)}


def test_area_under_a_curve() -> None:
    """The authors' sum of trapezoids over T, which makes (T - 1) / T of a constant 1; and a curve seen now and then.

    Seen failing with the mean over T - 1 segments.
    """
    assert float(curves.area(torch.ones(100), 1, 100)) == pytest.approx(99 / 100)
    values = torch.rand(100, 3, generator=random(), dtype=torch.float64)
    by_hand = sum((values[i] + values[i - 1]) / 2 for i in range(1, 100)) / 100
    assert torch.allclose(curves.area(values, 1, 100), by_hand)
    assert float(curves.area(torch.ones(11), 10, 100)) == pytest.approx(1)
    assert float(curves.area(torch.tensor([1.0, 0.0, 0.0]), 50, 100)) == pytest.approx(0.25)


def test_moving_average() -> None:
    assert figure.smooth(torch.tensor([0.0, 2.0, 4.0, 4.0]), 2).tolist() == [1, 3, 4]


def test_tables_are_means_over_test_alphabets_with_the_spread_over_seeds() -> None:
    """Three points of two seeds and two alphabets, by hand. Seen failing with the spread over alphabets."""
    one = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]).expand(3, 2, 2)
    found = {("leap", 1): curves.Curves(torch.ones(4, 2, 2), one[:1].expand(4, 2, 2), one, one / 10)}
    rows = summary.held_out_images(SMALL, found)
    assert [row["inner_step"] for row in rows] == [0, 2, 4]
    assert (rows[0]["loss"], rows[0]["loss_std"]) == pytest.approx((4, 8**0.5), abs=1e-5)
    assert (rows[0]["error"], rows[0]["error_std"]) == pytest.approx((0.4, 0.08**0.5), abs=1e-5)
    areas = summary.areas(SMALL, found)
    assert [(row["seed"], row["auc_loss"], row["auc_held_out_loss"]) for row in areas] == [(3, 0.75, 2), (5, 0.75, 6)]
    assert summary.over_seeds(areas, "leap", 1, "final_error") == pytest.approx((0.4, 0.08**0.5))


# ------------------------------------------------------------------------------------------------ the whole study

TINY = {
    "studies__leap_comparison__quick__" + key: value
    for key, value in dict(
        seeds=[3, 5], alphabets=[1, 2], test_alphabets=2, way=3, filters=4, inner_batch=4, inner_steps=6, maml_steps=2,
        meta_steps=2, meta_batch=2, measure_every=3, window=2,
    ).items()
}  # fmt: skip


def test_the_study(data: None, edit: Edit, stage: Stage) -> None:
    edit(**TINY)
    said = stage(app) + stage(pages, "leap_comparison")
    assert said.count("error on held-out images") == 11  # five methods at both n, and no pre-training once
    metrics = json.loads(Path("reports/studies/leap_comparison.metrics.json").read_text())
    assert list(metrics) == ["auc_loss", "auc_held_out_error"] and set(metrics["auc_loss"]) == set(methods.METHODS)
    assert all(0 < value < 1 for value in metrics["auc_held_out_error"].values())
    page = Path("reports/studies/leap_comparison.md").read_text()
    assert "data glyphs" in page and "| Leap |" in page and "n in {1, 2}" in page and str(Path.cwd()) not in page
    assert "15 images are trained on and 5 are held out" in page and "1,000 meta-steps of 20 tasks, 10 seeds" in page
    tables = {path.stem: path.read_text().splitlines() for path in Path("plots/studies/leap_comparison").iterdir()}
    assert tables["areas"][0].startswith("method,alphabets,seed,auc_loss")
    assert {name: len(rows) - 1 for name, rows in tables.items()} == {
        "areas": 6 * 2 * 2, "training_batches": 6 * 2 * 6, "held_out_images": 6 * 2 * 3
    }  # fmt: skip
    none = [row.partition(",")[2] for row in tables["held_out_images"] if row.startswith("none")]
    assert [row.partition(",")[2] for row in none[:3]] == [row.partition(",")[2] for row in none[3:]]  # whatever n is
    assert 10_000 < Path("reports/studies/leap_comparison.png").stat().st_size < 200_000
    edit(studies__leap_comparison__quick__test_alphabets=20)
    assert "22 alphabets of at least 3 characters are needed" in stage(app, fails=True)


@pytest.mark.parametrize(("key", "value", "complaint"), [
    ("alphabets", [5, 1], "alphabets must ascend"),
    ("seeds", [], "studies.leap_comparison.quick.seeds: List should have at least 1 item"),
    ("seeds", [3, 3], "seeds must differ"),
    ("measure_every", 4, "inner_steps must be a multiple of measure_every, got 6 and 4"),
    ("window", 7, "window must not exceed inner_steps, got 7 and 6"),
    ("inner_lr", 0, "studies.leap_comparison.quick.inner_lr: Input should be greater than 0"),
    ("outer_lr", {"maml": 11}, "studies.leap_comparison.quick.outer_lr.maml: Input should be less than or equal to 10"),
    ("augmentation", {"degrees": 9, "shift": 0, "smallest": 2, "largest": 1}, "augmentation: smallest is larger than largest"),
    ("rate", 0.1, "studies.leap_comparison.quick.rate is not a parameter here"),
])  # fmt: skip
def test_what_is_wrong_is_named(edit: Edit, stage: Stage, key: str, value: object, complaint: str) -> None:
    edit(**TINY | {f"studies__leap_comparison__quick__{key}": value})
    assert complaint in stage(app, fails=True)
