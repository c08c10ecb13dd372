"""Study: what the protocol hides. The same learners under each choice that papers leave unsaid, 5-way 1-shot."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import typer
from matplotlib.figure import Figure
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import algorithms, evaluation, training
from metalib.data import splits
from metalib.data.tasks import Tasks, draw
from metalib.randomness import generator
from metalib.studies import protocols
from metalib.types import Params
from stages import files, meta_train, params, study, tables
from stages.command import console, device, keep_heap, one_sentence, tensor_float

app = typer.Typer(add_completion=False)
NAME, SETTING = "protocols", "5w1s"
Scheme = Literal["characters", "vinyals", "alphabets"]
WORDS = {"transductive": "transductive statistics", "inductive": "inductive statistics"}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Protocols:
    """The first of `schemes` and of `queries` are the reference's."""

    learners: Annotated[list[str], Field(min_length=2)]
    share: Annotated[float, Field(gt=0, le=1)]  # of the meta-steps that the budget of the same name gives each learner
    seeds: PositiveInt
    test_tasks: PositiveInt
    queries: Annotated[list[PositiveInt], Field(min_length=1)]  # images per class
    schemes: Annotated[list[Scheme], Field(min_length=1)]  # of the split


class Choice(NamedTuple):
    """A training and a test. All that follow the reference depart from it in one thing; `paired`: on the same tasks."""

    words: str
    scheme: Scheme
    trained: str  # batch statistics in meta-training
    statistics: str  # batch statistics at test
    query: int
    rotated: bool
    paired: bool


def choices(asked: Protocols) -> Iterator[Choice]:
    """The reference, then each departure from it."""
    scheme, query = asked.schemes[0], asked.queries[0]
    yield Choice("reference", scheme, "transductive", "transductive", query, False, True)
    yield Choice("tested with inductive statistics", scheme, "transductive", "inductive", query, False, True)
    yield Choice("trained and tested with inductive statistics", scheme, "inductive", "inductive", query, False, True)
    for other in asked.queries[1:]:
        yield Choice(f"{other} query images per class", scheme, "transductive", "transductive", other, False, True)
    yield Choice("classes turned at test", scheme, "transductive", "transductive", query, True, True)
    for name in asked.schemes[1:]:
        yield Choice(f"split {name}", name, "transductive", "transductive", query, False, False)


@app.command()
@one_sentence
def main() -> None:
    """Write the study's outputs (stages/study.py): shifts of accuracy in points, and the order of learners, for each choice."""
    began = time.monotonic()
    file = params.read()
    asked = params.study(file, NAME, Protocols)
    file = file.model_copy(update={"meta_train": file.meta_train.model_copy(update={"budget": file.studies[NAME].budget})})
    cells = {name: cell(file, name, asked) for name in asked.learners}
    where = device()
    keep_heap()
    tensor_float(False)
    found: dict[str, dict[str, Tensor]] = {choice.words: {} for choice in choices(asked)}
    for name, base in cells.items():
        trained: dict[tuple[str, str], list[Params]] = {}
        for choice in choices(asked):
            key = (choice.scheme, choice.trained)
            stored = task_file(file, choice.scheme, asked)
            if key not in trained:
                started = time.monotonic()
                trained[key] = train(base.model_copy(update={"statistics": choice.trained}), name, stored, where)
                console.print(f"{name}, split {key[0]}, {WORDS[key[1]]}: {time.monotonic() - started:.0f} s")
            found[choice.words][name] = test(base, name, stored, choice, trained[key], where)
    reference = found["reference"]
    rows, rankings = [], {}
    for choice in choices(asked):
        rankings[choice.words] = protocols.ranking(reference, found[choice.words])
        for name, values in found[choice.words].items():
            mean, half = evaluation.interval(values)
            moved = protocols.shift(reference[name], values, paired=choice.paired)
            rows.append({
                "choice": choice.words, "learner": name, "accuracy": round(100 * mean, 2), "ci95": round(100 * half, 2),
                "shift": round(100 * moved.mean, 2), "shift_ci95": round(100 * moved.ci95, 2), "paired": choice.paired,
            })  # fmt: skip
    metrics = {
        words.replace(" ", "_"): {
            **{str(row["learner"]): row["accuracy"] for row in rows if row["choice"] == words},
            "kendall_tau": round(ranked.tau, 2),
        }
        for words, ranked in rankings.items()
    }
    study.write(
        NAME,
        figure=figure(rows, asked),
        report=report(file, asked, cells, rows, rankings),
        data={"shifts": rows},
        metrics=metrics,
        where=where,
        began=began,
    )


def cell(file: params.File, name: str, asked: Protocols) -> params.Cell:
    """The learner's cell of the table, with its share of meta-steps and the study's seeds."""
    whole = params.cell(file, name, SETTING)
    steps = max(1, round(asked.share * whole.outer.meta_steps))
    every = max(1, round(asked.share * whole.outer.validate_every))
    outer = replace(whole.outer, meta_steps=steps, validate_every=every)
    seeds = [file.meta_train.seed + i for i in range(asked.seeds)]
    return whole.model_copy(update={"outer": outer, "seeds": seeds, "statistics": "transductive"})


def task_file(file: params.File, scheme: Scheme, asked: Protocols) -> files.TaskFile:
    """The characters of a split, its validation tasks as the split stage draws them, and the study's own test tasks.

    The test tasks have images for the most queries asked for, and turned classes.
    """
    shape = params.setting(file, SETTING)
    data = files.load_characters()
    classes = splits.divide(data, replace(file.split, scheme=scheme))

    def drawn(part: str, count: int, query: int, rotations: Literal["tasks", "none"]) -> Tasks:
        return draw(
            count,
            torch.from_numpy(getattr(classes, part)),
            way=shape.way,
            images=shape.shot + query,
            drawers=data.images.shape[1],
            rotations=rotations,
            generator=generator(file.tasks.seed, part, SETTING),
        )

    return files.TaskFile(
        torch.from_numpy(classes.train),
        drawn("validation", file.tasks.validation, shape.query, "none"),
        drawn("test", asked.test_tasks, max(asked.queries), "tasks"),
        {"way": shape.way, "shot": shape.shot},
    )


def train(cell: params.Cell, name: str, stored: files.TaskFile, where: torch.device) -> list[Params]:
    """The meta-parameters of each seed, chosen on validation tasks."""
    *_, result = meta_train.train(cell, name, SETTING, stored, cell.seeds, where, None)
    assert isinstance(result, training.Result)
    return result.params


def test(
    cell: params.Cell, name: str, stored: files.TaskFile, choice: Choice, trained: list[Params], where: torch.device
) -> Tensor:
    """Accuracy on each test task, (tasks,), mean over seeds."""
    way, shot = stored.protocol["way"], stored.protocol["shot"]
    characters = torch.from_numpy(files.load_characters().images).to(where)
    drawn = stored.test
    rotations = drawn.rotations if choice.rotated else torch.zeros_like(drawn.rotations)
    some = Tasks(*(part.to(where) for part in (drawn.classes, drawn.images[..., : shot + choice.query], rotations)))
    network = params.make_network(cell, way=way, image_size=characters.shape[-1])
    learner = algorithms.build(name, cell.learner | cell.test)
    seeds = [evaluation.evaluate(learner, network, p, characters, some, shot, every_step=False) for p in trained]
    return torch.stack([getattr(accuracy, choice.statistics)[-1] for accuracy in seeds]).mean(0).cpu()


def report(
    file: params.File,
    asked: Protocols,
    cells: dict[str, params.Cell],
    rows: list[dict[str, object]],
    rankings: dict[str, protocols.Ranking],
) -> str:
    shape = params.setting(file, SETTING)
    table = [
        [
            words,
            *(
                f"{row['accuracy']} ± {row['ci95']}"
                if words == "reference"
                else f"{row['accuracy']} ({row['shift']:+} ± {row['shift_ci95']})"
                for row in rows
                if row["choice"] == words
            ),
        ]
        for words in rankings
    ]
    order = [[words, " > ".join(r.order), f"{r.tau:.2f}", pairs(r.swapped), pairs(r.decided)] for words, r in rankings.items()]
    upset = [words for words, r in rankings.items() if r.decided]
    count = f"{len(rankings) - 1} choices"
    answer = (
        f"Pairs of learners change places with certainty under {len(upset)} of the {count} ({'; '.join(upset)})"
        if upset
        else f"No pair of learners changes places with certainty under any of the {count}"
    )
    steps = ", ".join(f"{name} {cell.outer.meta_steps}" for name, cell in cells.items())
    characters = ", ".join(f"{name} {count}" for name, count in training_characters(file, asked))
    return f"""# What the protocol hides

The same learners, {shape.way}-way {shape.shot}-shot, under each choice that papers leave unsaid. Nobody's figure yet: the
slides' table, like the papers, puts side by side what was measured under different ones. Reference: split
{asked.schemes[0]}, {asked.queries[0]} query image(s) per class, classes upright at test, batch statistics of the whole
query set (transductive) in meta-training and at test. Every other row departs from it in one thing (a learner that is
trained inductively is tested so).

![Shifts of accuracy, and accuracies](protocols.png)

Accuracy in % on {asked.test_tasks} test tasks and, in brackets, the shift against the reference in points with its 95 %
interval: paired, on the same tasks, but for the splits, which have tasks of their own. The intervals are over tasks, for
the weights that were trained: where a choice means another training (inductive training, another split), its shift also
holds the difference between two trainings, which no interval here is of.

{tables.markdown(["choice", *asked.learners], table)}

## Does the ranking of learners survive?

{answer}; the order of the means changes under {sum(bool(r.swapped) for r in rankings.values())}. Kendall's tau is 1 where
the order is the reference's. Certain: paired t-tests at 5 %, Holm-corrected, in the reference and under the choice.

{tables.markdown(["choice", "order", "tau", "changed places", "with certainty"], order)}

## Protocol

Budget {file.studies[NAME].budget}: {asked.seeds} seed(s) and {asked.share:.0%} of the meta-steps that the budget of that
name gives each learner ({steps}). Everything else is as in the table of accuracies; the meta-step is chosen on validation
tasks of the same split. Queries are nested, turned classes are the upright ones turned, so that tasks are compared one by
one. Each split also has its own number of characters to learn from: {characters}.
"""


def training_characters(file: params.File, asked: Protocols) -> list[tuple[str, int]]:
    """How many characters each split has to learn from."""
    data = files.load_characters()
    return [(name, len(splits.divide(data, replace(file.split, scheme=name)).train)) for name in asked.schemes]


def pairs(names: list[tuple[str, str]]) -> str:
    return ", ".join(f"{b} before {a}" for a, b in names) or "-"


def figure(rows: list[dict[str, object]], asked: Protocols) -> Figure:
    """Left: shifts against the reference with intervals. Right: accuracies, a line per learner, so that crossings show."""
    words = list(dict.fromkeys(str(row["choice"]) for row in rows))
    drawn, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.55 * len(words)), layout="constrained", sharey=True)
    for i, name in enumerate(asked.learners):
        mine = [row for row in rows if row["learner"] == name]
        colour, marker = study.COLOURS[i % len(study.COLOURS)], "osD^v<>"[i % 7]
        places = [k + 0.13 * (i - (len(asked.learners) - 1) / 2) for k in range(len(words))]
        values, halves = [row["shift"] for row in mine], [row["shift_ci95"] for row in mine]
        left.errorbar(values, places, xerr=halves, fmt=marker, color=colour, capsize=2, markersize=5, label=name)
        right.plot([row["accuracy"] for row in mine], range(len(words)), marker + "-", color=colour, markersize=5)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(yticks=range(len(words)), yticklabels=words, xlabel="shift in test accuracy against the reference, points")
    left.invert_yaxis()
    right.set(xlabel="test accuracy, %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(asked.learners), frameon=False)
    return drawn


if __name__ == "__main__":
    app()
