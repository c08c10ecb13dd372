"""Compare the learners of one setting."""

import csv
import itertools
import textwrap
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import torch
import typer
from numpy.typing import NDArray
from rich.markdown import Markdown

from metalib.comparison import Difference, differences
from stages import files, tables
from stages.command import console, one_sentence
from stages.guard import guarded
from stages.palette import style

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

app = typer.Typer(add_completion=False)
PROTOCOL = ("data", "images", "split", "test_rotations", "query")
Rows = dict[str, dict[str, Any]]  # learner -> its metrics and what they are of


class Curve(NamedTuple):
    """Accuracy in % against a count of steps."""

    x: list[int]
    y: list[float]


@app.command()
@one_sentence
@guarded("compare")
def main(
    setting: Annotated[str, typer.Argument(help="for instance 5w1s")],
    only: Annotated[list[str] | None, typer.Option(help="a learner to compare; may be given several times")] = None,
) -> None:
    """Write a page, a figure and the paired differences of all learners that were evaluated in a setting.

    reports/<setting>.md and .png, and plots/differences/<setting>.csv.
    With --only, the page of just these learners is printed, and nothing is written.
    """
    known = tables.learners(setting)
    if not known:
        raise ValueError(f"metrics/{setting} holds no result; make them with: dvc repro compare@{setting}")
    if unknown := [name for name in only or [] if name not in known]:
        raise ValueError(f"--only: {unknown[0]!r} has no result in {setting}; there are {', '.join(known)}")
    rows = tables.results(setting, only or known)
    if only:
        text = page(setting, rows, compared(setting, rows))
        console.print(Markdown(text) if console.is_terminal else text, markup=False, highlight=False)
        return
    pairs = compared(setting, rows)
    table = Path(f"plots/differences/{setting}.csv")
    text = page(setting, rows, pairs)
    if pairs:
        text += f"\nEvery pair with its interval and p: [{table}](../{table}).\n"
    text += f"\n![Accuracy, learning curves and inner steps of {tables.title(rows)}]({setting}.png)\n"
    with files.whole(Path(f"reports/{setting}.png")) as picture, files.whole(Path(f"reports/{setting}.md")) as beside:
        draw(picture, setting, rows)
        beside.write_text(text, encoding="utf-8")
    if pairs:
        files.write_csv(table, [pair._asdict() for pair in pairs])
    else:
        with files.whole(table) as beside:
            beside.write_text(",".join(Difference._fields) + "\n")
    console.print(f"reports/{setting}.md: {len(rows)} learners, {len(pairs)} differences")


def compared(setting: str, rows: dict[str, dict[str, Any]]) -> list[Difference]:
    """Paired differences of the seeds' mean accuracy on the tasks that all learners were tested on.

    ValueError where they were tested under different protocols: their tasks are not the same. And where a result is not
    the one that its metric is of, as after only one of them was put back.
    """
    protocols = {tuple(rows[name][key] for key in PROTOCOL) for name in rows}
    if len(protocols) > 1:
        found = "; ".join(", ".join(map(str, protocol)) for protocol in sorted(protocols))
        raise ValueError(
            f"{setting} was tested under different protocols: {found}; make one of them: dvc repro compare@{setting}"
        )
    accuracies = {}
    for name in sorted(rows):
        with files.load_arrays(files.results_file(setting, name), f"evaluate@{name}-{setting}") as arrays:
            accuracies[name] = torch.from_numpy(_fractions(arrays["transductive"]))[:, -1].mean(0)
        mean = 100 * float(accuracies[name].double().mean())
        if abs(mean - rows[name]["accuracy"]) > 0.006:  # the metric is rounded to two digits
            raise ValueError(
                f"{files.results_file(setting, name)} has an accuracy of {mean:.2f}, {files.metrics_file(setting, name)} "
                f"{rows[name]['accuracy']:.2f}; make both anew: dvc repro evaluate@{name}-{setting}"
            )
    count = min(len(values) for values in accuracies.values())
    return differences({name: values[:count] for name, values in accuracies.items()})


def _fractions(values: NDArray[Any]) -> NDArray[Any]:
    """Accuracies (seeds, steps, tasks); ValueError for other arrays."""
    fits = values.dtype.kind == "f" and values.ndim == 3 and values.size and values.shape[2] >= 2
    if not fits or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{values.dtype} {values.shape} are no accuracies, in [0, 1], of two or more tasks")
    return values


def page(setting: str, rows: Rows, pairs: list[Difference]) -> str:
    """The setting's page: every learner by rank, then their differences."""
    known = tables.published()
    table = []
    for name, row in rows.items():
        theirs = known.get((name, setting))
        table.append([
            name,
            tables.percent(row["accuracy"], row["ci95"]),
            tables.percent(row["inductive"], row["inductive_ci95"]),
            tables.published_text(*theirs) if theirs else "-",
            f"{row['seed_std']:.2f}" if "seed_std" in row else "-",
            str(row["inner_steps"]),
            f"{row['train_shot']} + {row['train_query']}",
            f"{row['meta_steps']} x {row['meta_batch']}" if row["meta_steps"] else "none",
        ])  # fmt: skip
    header = [
        "learner",
        "transductive",
        "inductive",
        "published",
        "std over seeds",
        "inner steps",
        "images per class in training",
        "meta-steps x tasks",
    ]
    text = [
        f"# {tables.title(rows)}",
        "Test accuracy in %, with its 95 % interval over test tasks.",
        f"Protocol: {tables.provenance(rows)}.",
        tables.markdown(header, table),
        "*Transductive*: batch norm with the statistics of the whole query set, as for the published numbers. *Inductive*: "
        "with those of the support set, so that a prediction does not depend on the other queries. *Inner steps* are those at "
        "test; *images per class* are support + query.",
        "The learners were not all trained for equally long: the last column says for how many meta-steps, and with how many "
        "tasks in each. The [benchmarks](../benchmarks/README.md) show what a meta-step of each learner costs.",
    ]
    if pairs:
        ranked = list(rows)
        text += [
            "## Differences on the same test tasks",
            "Each learner and the next in rank, in percentage points:",
            tables.markdown(["pair", "difference", "p", "at the 5 % level"], neighbours(ranked, pairs)),
        ]
        if len(ranked) > 2:
            text += [
                "All pairs, row minus column (a rank), in points; in brackets where it is undecided which is better:",
                tables.markdown(["", *(str(rank) for rank in range(2, len(ranked) + 1))], matrix(ranked, pairs)),
            ]
        number = "one pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
        text.append(
            f"Accuracies are transductive; p is of a paired t-test, Holm-corrected for {number}. Intervals and p-values cover "
            "the random choice of test tasks, not the training: another seed would give other weights. The standard deviation "
            "over seeds, in the first table, shows how much that changes; a budget with one seed has none."
        )
    return "\n\n".join(text) + "\n"


def between(pairs: list[Difference]) -> dict[tuple[str, str], Difference]:
    """(a, b) -> the difference a - b, both ways round."""
    turned = [d._replace(first=d.second, second=d.first, mean=-d.mean) for d in pairs]
    return {(d.first, d.second): d for d in (*turned, *pairs)}


def neighbours(ranked: list[str], pairs: list[Difference]) -> list[list[str]]:
    """A row for each learner and the next."""
    known = between(pairs)
    rows = []
    for d in (known[pair] for pair in itertools.pairwise(ranked)):
        verdict = f"{d.first if d.mean > 0 else d.second} is better" if d.p < 0.05 else "undecided"
        rows.append([f"{d.first} - {d.second}", f"{100 * d.mean:+.2f} ± {100 * d.ci95:.2f}", f"{d.p:.2g}", verdict])
    return rows


def matrix(ranked: list[str], pairs: list[Difference]) -> list[list[str]]:
    """Every learner's difference to those behind it."""
    known = between(pairs)

    def cell(a: str, b: str) -> str:
        if ranked.index(a) >= ranked.index(b):
            return ""
        d = known[a, b]
        return f"{100 * d.mean:.1f}" if d.p < 0.05 else f"({100 * d.mean:.1f})"

    return [[f"{rank} {a}", *(cell(a, b) for b in ranked[1:])] for rank, a in enumerate(ranked[:-1], 1)]


def curve(setting: str, name: str, file: str, x: str, y: str) -> Curve:
    """Two columns of one of the tables that evaluate leaves."""
    path = files.plots_folder(setting, name) / file
    with files.readable(path, f"evaluate@{name}-{setting}"):
        with open(path, newline="") as table:
            points = [(int(row[x]), float(row[y])) for row in csv.DictReader(table)]
        if not points or not all(0 <= point[1] <= 100 for point in points):
            raise ValueError(f"{y} is to be a percentage in each of at least one row")
    return Curve([point[0] for point in points], [point[1] for point in points])


def draw(path: Path, setting: str, rows: Rows) -> None:
    """Three panels: accuracy beside the published number, learning curves, accuracy by inner step.

    A learner has one colour and one marker in all three; an untrained learner would stretch every axis,
    so it appears only as a note.
    """
    looks = style(list(rows))
    trained = [name for name in rows if rows[name]["meta_steps"]] or list(rows)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.2 + 0.26 * len(rows)), layout="constrained", width_ratios=(1.15, 1, 1)
    )
    ranking(left, setting, rows, trained)
    for name in trained:
        line(middle, curve(setting, name, "learning_curve.csv", "step", "validation"), looks[name])
        steps = curve(setting, name, "by_step.csv", "inner_step", "transductive")
        line(right, Curve(steps.x[1:], steps.y[1:]), looks[name])  # before the first step a learner guesses
    middle.set(xlabel="meta-steps", ylabel="validation accuracy, %", title="while meta-training")
    if any(rows[name]["meta_steps"] for name in trained):  # the longest training would squeeze the others
        middle.set(xlabel="meta-steps, log scale", xscale="log")
        low, high = middle.get_xlim()
        ticks = [tick for power in range(7) for tick in (10**power, 2 * 10**power, 5 * 10**power) if low <= tick <= high]
        middle.set_xticks(ticks, [f"{tick // 1000}k" if tick >= 1000 else str(tick) for tick in ticks])
        middle.xaxis.set_minor_locator(NullLocator())
    right.set(xlabel="inner steps at test", ylabel="test accuracy, transductive, %", title="while adapting to test tasks")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.title.set_size("medium")
    handles = [Line2D([], [], label=name, linewidth=1, markersize=4, **looks[name]) for name in trained]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize="small", frameon=False, handlelength=3.5)
    figure.suptitle(textwrap.fill(f"{tables.title(rows)}: {tables.provenance(rows)}", 120), fontsize="medium")
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)


def line(axis: Axes, points: Curve, look: dict[str, Any]) -> None:
    """A thin curve; one of many points has no markers, and one of a single point lies above the others."""
    alone = len(points.x) == 1
    marker: dict[str, Any] = {"markersize": 7 if alone else 4} if len(points.x) <= 5 else {"marker": ""}
    axis.plot(*points, **look | marker, linewidth=1, zorder=3 if alone else 2)


def ranking(axis: Axes, setting: str, rows: Rows, trained: list[str]) -> None:
    """A line for each learner: filled markers are transductive, open ones inductive, a cross is the published number."""
    looks, known = style(list(rows)), tables.published()
    for place, (name, row) in enumerate(rows.items()):
        marker = looks[name] | {"linestyle": "none", "markersize": 5, "capsize": 3}
        if name not in trained:
            note = f"← not trained: {row['accuracy']:.1f}, inductive {row['inductive']:.1f}"
            axis.annotate(note, (0.02, place), xycoords=axis.get_yaxis_transform(), va="center", fontsize="small")
            continue
        axis.errorbar(row["accuracy"], place - 0.2, xerr=row["ci95"], **marker)
        axis.errorbar(row["inductive"], place, xerr=row["inductive_ci95"], **marker | {"markerfacecolor": "white"})
        if (name, setting) in known:
            accuracy, half = known[name, setting]
            axis.errorbar(float(accuracy), place + 0.2, xerr=float(half or 0), **marker | {"marker": "x", "capsize": 0})
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel="test accuracy, %")
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none", "markersize": 5}
    handles = [
        Line2D([], [], marker="o", label="transductive", **grey),
        Line2D([], [], marker="o", markerfacecolor="white", label="inductive", **grey),
        Line2D([], [], marker="x", label="published, transductive", **grey),
    ]
    axis.legend(handles=handles, fontsize="small", loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, frameon=False)


if __name__ == "__main__":
    app()
