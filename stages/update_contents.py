"""What the updates of MAML, FOMAML and Reptile contain, and how far combinations of inner gradients learn."""

import math
import time
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from metalib import training
from metalib.algorithms import describe
from metalib.data import tasks
from metalib.models.conv4 import Conv4
from metalib.randomness import generator
from metalib.studies import combinations, expansions
from metalib.studies.combinations import COMBINATIONS, Measured
from stages import files, params, study, tables
from stages.command import console, device, keep_heap, one_sentence, tensor_float

app = typer.Typer(add_completion=False)
NAME = "update_contents"
SETTING = "5w5s"
CHUNK = 16  # sequences at a time: memory, not meaning
LABELS = {"maml": "MAML", "fomaml": "FOMAML", "reptile": "Reptile"}
Gradients = Annotated[int, Field(ge=2)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Coefficients:
    """How the coefficients are measured."""

    shot: PositiveInt  # images of each class in a mini-batch
    batches: int = Field(ge=2)  # mini-batches of a task
    gradients: list[Gradients] = Field(min_length=1)  # k
    alphas: list[PositiveFloat] = Field(min_length=1)
    draws: int = Field(ge=2)  # of tasks


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Combinations:
    """How the combinations of gradients are trained."""

    shot: PositiveInt  # images of each class in an inner step
    inner_lr: PositiveFloat
    meta_step: PositiveFloat
    meta_steps: PositiveInt
    meta_batch: PositiveInt
    validate_every: PositiveInt
    validation_tasks: PositiveInt
    test_steps: PositiveInt


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Kind:
    """The study's numbers."""

    seed: int = Field(ge=0)
    network: dict[str, Any]
    coefficients: Coefficients
    combinations: Combinations


class Row(NamedTuple):
    """A learner's measured coefficients: mean over draws, and the standard error of it."""

    learner: str
    k: int
    alpha: float
    average: float
    average_error: float
    inner: float
    inner_error: float
    residual: float


@app.command()
@one_sentence
def main() -> None:
    """Write the study update_contents: figure, page, coefficients, learning curves, metrics.

    Coefficients are measured in double precision on the CPU; METALIB_DEVICE chooses where the combinations are trained.
    """
    began = time.monotonic()
    file = params.read()
    kind = params.study(file, NAME, Kind)
    budget = file.studies[NAME].budget
    stored = files.load_tasks(SETTING)
    where = device()
    keep_heap()
    tensor_float(False)
    images = torch.from_numpy(files.load_characters().images)
    way, shot = (int(stored.protocol[key]) for key in ("way", "shot"))
    try:
        network = Conv4(way=way, image_size=images.shape[-1], **kind.network)
    except ValidationError as error:
        raise ValueError(describe(error, f"studies.{NAME}.{budget}.network")) from None
    rows = coefficients(kind, network, images, stored.train)
    protocol = kind.combinations
    validation = files.first(stored.validation, protocol.validation_tasks, "validation_tasks")
    curves = list[Measured]()
    try:
        for measured in combinations.learning_curves(
            network,
            network.init(generator(kind.seed, "initial weights", device=where)),
            images.to(where),
            stored.train.to(where),
            tasks.Tasks(*(index.to(where) for index in validation)),
            combinations.Protocol(
                protocol.shot, protocol.inner_lr, protocol.meta_step, protocol.meta_steps, protocol.meta_batch,
                protocol.validate_every, protocol.test_steps,
            ),
            shot=shot,
            generators=[generator(kind.seed, NAME, "tasks", device=where) for _ in range(max(map(len, COMBINATIONS.values())))],
        ):  # fmt: skip
            console.print(
                f"{measured.combination}: meta-step {measured.step}, {100 * measured.accuracy:.2f} %", highlight=False
            )
            curves.append(measured)
    except training.Diverged as error:
        raise ValueError(f"studies.{NAME}.{budget}.combinations: {error}; lower inner_lr or meta_step") from None
    last = {m.combination: round(100 * m.accuracy, 2) for m in curves}
    study.write(
        NAME,
        figure=draw(rows, curves),
        report=report(kind, budget, stored.protocol, rows, last),
        data={
            "coefficients": [
                {**row._asdict(), "expected_average": a, "expected_inner": b}
                for row in rows
                for a, b in [expansions.EXPECTED[row.learner](row.k)]
            ],
            "learning_curves": [{**m._asdict(), "accuracy": round(100 * m.accuracy, 2)} for m in curves],
        },
        metrics={
            "inner_coefficient": {
                name: {f"k{row.k}": round(row.inner, 4) for row in rows if row.learner == name and row.alpha == rows[0].alpha}
                for name in LABELS
            },
            "accuracy": last,
            "data": stored.protocol["data"],
            "budget": budget,
        },
        where=where,
        began=began,
    )


def coefficients(kind: Kind, network: Conv4, images: torch.Tensor, pool: torch.Tensor) -> list[Row]:
    """Coefficients at the network's initial weights; the smallest alpha first."""
    asked = kind.coefficients
    weights = {n: v.double() for n, v in network.init(generator(kind.seed, "initial weights")).items()}
    random = generator(kind.seed, NAME, "mini-batches")
    found = dict[tuple[float, str, int], list[expansions.Coefficients]]()
    for _ in range(asked.draws):
        drawn = tasks.draw(
            1, pool, way=network.way, images=asked.batches * asked.shot, drawers=images.shape[1],
            rotations="classes", generator=random,
        )  # fmt: skip
        task = tasks.gather(images, drawn, asked.batches * asked.shot)
        x = task.support_x[0].double().unflatten(0, (asked.batches, -1))  # shot by shot: as many of each class in every one
        y = task.support_y[0].unflatten(0, (asked.batches, -1))
        average, inner_product = expansions.average_gradients(network.loss, weights, x, y)
        for alpha in sorted(asked.alphas):
            for name in LABELS:
                for k in asked.gradients:
                    update = expansions.expected_update(name, network.loss, weights, x, y, k=k, alpha=alpha, chunk=CHUNK)
                    measured = expansions.coefficients(update, average, inner_product, alpha)
                    found.setdefault((alpha, name, k), []).append(measured)
    rows = []
    for (alpha, name, k), draws in found.items():
        values = torch.tensor(draws, dtype=torch.float64)
        (average_mean, inner_mean, residual), errors = values.mean(0).tolist(), values.std(0) / math.sqrt(len(draws))
        rows.append(Row(name, k, alpha, average_mean, float(errors[0]), inner_mean, float(errors[1]), residual))
    return rows


def draw(rows: list[Row], curves: list[Measured]) -> Figure:
    """The two coefficients against k, measured and expected; learning curves."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained", width_ratios=(1, 1, 1.5))
    left, middle, right = axes
    alphas = sorted({row.alpha for row in rows})
    for i, (name, label) in enumerate(LABELS.items()):
        ks = sorted({row.k for row in rows})
        for axis, which in ((left, 0), (middle, 1)):
            expected = [expansions.EXPECTED[name](k)[which] for k in ks]
            axis.plot(ks, expected, "-:"[i == 1], color=study.COLOURS[i], linewidth=2 if i == 1 else 1, label=f"{label}, slide")
        for alpha, marker in zip(alphas, "osDv^<>", strict=False):
            shown = [row for row in rows if row.learner == name and row.alpha == alpha]
            style: dict[str, Any] = {
                "fmt": marker, "color": study.COLOURS[i], "capsize": 3,
                "markersize": 8 if marker == "o" else 5, "markerfacecolor": "none" if marker == "o" else None,
            }  # fmt: skip
            x = [row.k + 0.06 * (i - 1) for row in shown]
            left.errorbar(x, [row.average for row in shown], [row.average_error for row in shown], **style)
            middle.errorbar(
                x, [row.inner for row in shown], [row.inner_error for row in shown],
                label=f"{label}, alpha = {alpha:g}", **style,
            )  # fmt: skip
    left.set(title="AvgGrad", ylabel="coefficient")
    middle.set(title="- alpha AvgGradInner", ylabel="coefficient")
    for axis in (left, middle):
        axis.set(xlabel="gradients k", xticks=sorted({row.k for row in rows}))
    for name, weights in COMBINATIONS.items():
        points = [m for m in curves if m.combination == name]
        line = "-" if len(weights) == 1 or weights[0] == 1 else ":" if weights[0] == 0 else "--"
        right.plot(
            [m.step for m in points], [100 * m.accuracy for m in points],
            color=["#000000", *study.COLOURS][len(weights) - 1], linestyle=line, marker=".", label=name,
        )  # fmt: skip
    right.set(title="outer steps along combinations", xlabel="meta-steps", ylabel="validation accuracy, %")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize="small", frameon=False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize="small", frameon=False)
    return figure


def report(kind: Kind, budget: str, protocol: dict[str, Any], rows: list[Row], last: dict[str, float]) -> str:
    """The study's page."""
    asked, learning = kind.coefficients, kind.combinations
    network = ", ".join(f"{key} {value}" for key, value in kind.network.items())
    measured = []
    for row in rows:
        average, inner_product = expansions.EXPECTED[row.learner](row.k)
        measured.append([
            f"{LABELS[row.learner]}, k = {row.k}, alpha = {row.alpha:g}",
            f"{average:g}", f"{row.average:.5f} ± {row.average_error:.1g}",
            f"{inner_product:g}", f"{row.inner:.4f} ± {row.inner_error:.1g}",
            f"{row.residual:.2g}",
        ])  # fmt: skip
    ranked = sorted(last.items(), key=lambda item: -item[1])
    return "\n\n".join([
        "# What the updates contain",
        "Slide \"Reptile\", the expansions; Nichol, Achiam, Schulman 2018, sections 5.1 and 6.2 "
        "([arXiv 1803.02999](https://arxiv.org/abs/1803.02999)). In expectation over mini-batches the updates of MAML, FOMAML "
        "and Reptile are a multiple of AvgGrad, the gradient of joint training, less a multiple of alpha AvgGradInner, which "
        "makes gradients of different mini-batches agree. Here both multiples are measured on the network and the images, "
        "and the outer loop steps along combinations of the inner loop's gradients.",
        f"Budget {budget}, data {protocol['data']}, {protocol['way']}-way, network: {network}; seed {kind.seed}.",
        f"![Coefficients, and learning curves of combinations of gradients]({NAME}.png)",
        "## Coefficients",
        f"At the initial weights, in double precision: {asked.batches} mini-batches of {asked.shot} image(s) of each class, "
        f"all sequences of k of them with replacement, {asked.draws} tasks. The learner's mean update over the sequences is "
        "regressed on AvgGrad and on -alpha AvgGradInner, computed by themselves, over all weights; ± is the standard error "
        "over tasks, the residual that of the regression over the length of the AvgGradInner part.",
        tables.markdown(
            ["update", "AvgGrad, slide", "measured", "-alpha AvgGradInner, slide", "measured", "residual"], measured
        ),
        "The expansions want a loss that is smooth between the weights of an inner loop. This one is so only as long as no "
        "ReLU crosses its kink, where a gradient jumps by what no Hessian at the initial weights knows of. Where the residual "
        "is not small, such jumps (and O(alpha^2)) outweigh the AvgGradInner part; its coefficient is no longer the slides'. "
        "Reptile's update is a difference of weights over alpha: at a tiny alpha its residual is rounding.",
        "## Combinations of gradients",
        f"5-way 5-shot. Inner loop: SGD at {learning.inner_lr:g} on the mean loss, {learning.shot} images of each class in a "
        f"step, other ones in every step. Outer step: {learning.meta_step:g} times the inner rate along the combination, "
        f"falling linearly to 0 over {learning.meta_steps} meta-steps of {learning.meta_batch} task(s). Accuracy after "
        f"{learning.test_steps} inner steps on {learning.validation_tasks} tasks of the validation characters, with the "
        "support set's statistics. All start from the same weights and see the same tasks.",
        tables.markdown(["combination", "validation accuracy, %"], [[name, f"{value:.2f}"] for name, value in ranked]),
        "## What differs from the publication",
        "The authors train for 40,000 meta-steps of one task with an outer step of 0.25, at an inner rate of 0.003 on the loss "
        "summed over 25 images, which is 0.075 on the mean; budget `paper` does so. A sum and its mean differ in the length of "
        "the outer step alone. Ours are tested on tasks of characters that are kept for such choices, at the meta-steps shown; "
        "theirs at every meta-step on one task.",
    ])  # fmt: skip


if __name__ == "__main__":
    app()
