"""Compare all algorithms in one setting."""

import csv
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer

from metalib.evaluation import Difference, differences
from stages import files, params, tables
from stages.command import console, one_sentence

matplotlib.use("Agg")
import matplotlib.pyplot as plt

app = typer.Typer(add_completion=False)
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito: colour-blind safe


@app.command()
@one_sentence
def main(setting: Annotated[str, typer.Argument(help="for instance 5w1s")]) -> None:
    """Write reports/<setting>.md and .png, and plots/<setting>/: learning curves, accuracies, differences as CSV."""
    file = params.read()
    shape = params.setting(file, setting)
    metrics = tables.metrics(file, setting)
    if not metrics:
        raise ValueError(f"metrics/{setting} holds no result; make them with: dvc repro compare@{setting}")
    pairs = compared(setting, list(metrics))
    curves = {name: learning_curve(setting, name) for name in metrics}
    title = f"{shape.way}-way {shape.shot}-shot"
    line = tables.provenance(list(metrics.values()))
    with files.whole(Path(f"reports/{setting}.md")) as beside:
        beside.write_text(report(title, setting, line, metrics, pairs))
    with files.whole(Path(f"reports/{setting}.png")) as beside:
        draw(beside, title, setting, line, metrics, curves)
    with files.whole(Path(f"plots/{setting}")) as folder:
        folder.mkdir()
        rows = [{"algorithm": n, **point} for n, curve in curves.items() for point in curve]
        write_csv(folder / "learning_curves.csv", rows)
        write_csv(folder / "by_step.csv", by_step(metrics))
        write_csv(folder / "differences.csv", [d._asdict() for d in pairs])
    console.print(f"reports/{setting}.md: {len(metrics)} algorithms, {len(pairs)} differences")


def compared(setting: str, names: list[str]) -> list[Difference]:
    """Paired differences of the seeds' mean accuracy on the tasks that all algorithms were tested on."""
    accuracies = {}
    for name in names:
        with files.load_arrays(files.results_file(setting, name), f"evaluate@{name}-{setting}") as arrays:
            accuracies[name] = torch.from_numpy(arrays["transductive"])[:, -1].mean(0)
    count = min(len(values) for values in accuracies.values())
    return differences({name: values[:count] for name, values in accuracies.items()})


def learning_curve(setting: str, name: str) -> list[dict[str, Any]]:
    """Validation accuracy against meta-steps, mean over seeds."""
    by_step: dict[int, list[float]] = {}
    for history in sorted(files.model_folder(setting, name).glob("seed*.csv")):
        with open(history, newline="") as rows:
            for row in csv.DictReader(rows):
                if row["validation"]:
                    by_step.setdefault(int(row["step"]), []).append(float(row["validation"]))
    return [{"step": step, "validation": round(sum(values) / len(values), 2)} for step, values in sorted(by_step.items())]


def meta_training(setting: str, name: str) -> str:
    """How long the model was trained: meta-steps x tasks in each."""
    try:
        outer = json.loads((files.model_folder(setting, name) / "meta.json").read_text())["outer"]
    except OSError as error:
        raise ValueError(f"no trained model ({error}); make it with: dvc repro meta_train@{name}-{setting}") from None
    return f"{outer['meta_steps']} x {outer['meta_batch']}"


def by_step(metrics: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Test accuracy after each number of inner steps, under both protocols."""
    return [
        {"algorithm": name, "inner_step": int(k[1:]), "transductive": value, "inductive": row["inductive_by_step"][k]}
        for name, row in metrics.items()
        for k, value in row["by_step"].items()
    ]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    header = list(rows[0]) if rows else list(Difference._fields)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def report(title: str, setting: str, line: str, metrics: dict[str, dict[str, Any]], pairs: list[Difference]) -> str:
    """The setting's page."""
    known = tables.published()
    rows = []
    for name, row in sorted(metrics.items(), key=lambda item: -item[1]["accuracy"]):
        theirs = known.get((name, setting))
        rows.append([
            name,
            tables.percent(row["accuracy"], row["ci95"]),
            tables.percent(row["inductive"], row["inductive_ci95"]),
            tables.published_text(*theirs) if theirs else "-",
            f"{row['seed_std']:.2f}" if "seed_std" in row else "-",
            str(len(row["by_step"]) - 1),
            f"{row['train_shot']} + {row['train_query']}",
            meta_training(setting, name),
        ])  # fmt: skip
    header = [
        "algorithm",
        "transductive",
        "inductive",
        "published",
        "std over seeds",
        "inner steps",
        "images per class in training",
        "meta-steps x tasks",
    ]
    text = [
        f"# {title}",
        f"Accuracy in %, 95 % interval over test tasks: {line}.",
        tables.markdown(header, rows),
        "Transductive: batch norm over the whole query set, as the published numbers of the slides' table are. Inductive: "
        "batch norm with the support set's statistics.",
        "Learners need not have trained equally long: the last column. Who is ahead after the same time, and what a meta-step "
        "of each takes, is in the [benchmarks](../benchmarks/README.md).",
    ]
    if pairs:
        ranked = sorted(metrics, key=lambda name: -metrics[name]["accuracy"])
        text += [
            "## Differences on the same test tasks",
            "Each learner and the next in rank, in points:",
            tables.markdown(["pair", "points", "p", "at 5 %"], neighbours(ranked, pairs)),
            "Row minus column (by rank), in points, of all pairs; in brackets where the sign is not decided at 5 %:",
            tables.markdown(["", *(str(rank) for rank in range(2, len(ranked) + 1))], matrix(ranked, pairs)),
            f"Transductive. Paired t-tests, p Holm-corrected for {len(pairs)} pair(s); all with their intervals in "
            f"plots/{setting}/differences.csv. They speak of the tasks drawn, for the weights these seeds gave; how much a "
            "training seed moves a learner is the standard deviation over seeds above.",
        ]
    text.append(f"![Accuracy, learning curves and inner steps of {title}]({setting}.png)")
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
        verdict = f"{d.first if d.mean > 0 else d.second} is better" if d.p < 0.05 else "not decided"
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


def draw(
    path: Path,
    title: str,
    setting: str,
    line: str,
    metrics: dict[str, dict[str, Any]],
    curves: dict[str, list[dict[str, Any]]],
) -> None:
    """Three panels: accuracy beside the published number, learning curves, accuracy by inner step (in rank order)."""
    known = tables.published()
    names = sorted(metrics, key=lambda name: metrics[name]["accuracy"])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 2.6 + 0.24 * len(names)), layout="constrained")
    style = {name: (COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--") for i, name in enumerate(sorted(metrics))}
    for place, name in enumerate(names):
        row = metrics[name]
        shown = [
            (row["accuracy"], row["ci95"], "o", "black", 0.2),
            (row["inductive"], row["inductive_ci95"], "s", "#0072B2", 0.0),
        ]
        if (name, setting) in known:
            accuracy, half = known[name, setting]
            shown.append((float(accuracy), float(half or 0), "D", "#D55E00", -0.2))
        for value, half, marker, shade, shift in shown:
            left.errorbar(value, place + shift, xerr=half, fmt=marker, color=shade, capsize=3, markersize=4)
    for marker, shade, label in (("o", "black", "transductive"), ("s", "#0072B2", "inductive"), ("D", "#D55E00", "published")):
        left.plot([], [], marker, color=shade, label=label)
    left.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4), xlabel="test accuracy, %")
    left.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    for name in reversed(names):
        colour, line_style = style[name]
        curve = curves[name] if len(curves[name]) > 1 else []  # a single point is of a learner that learns nothing
        x, y = [p["step"] for p in curve], [p["validation"] for p in curve]
        middle.plot(x, y, "o", linestyle=line_style, color=colour, label=name, markersize=3)
        by_steps = {int(k[1:]): accuracy for k, accuracy in metrics[name]["by_step"].items() if k != "k0"}
        right.plot(list(by_steps), list(by_steps.values()), "o", linestyle=line_style, color=colour, markersize=3)
    middle.set(xlabel="meta-steps", ylabel="validation accuracy, %")
    right.set(xlabel="inner steps at test", ylabel="test accuracy, transductive, %")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    figure.suptitle(f"{title}\n{line}", fontsize=8)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    app()
