"""Compare Leap with its rivals on whole alphabets: learning curves, and the area under them against meta-training alphabets."""

import time
from typing import Any

import torch
import typer
from matplotlib.figure import Figure

from metalib.data.omniglot import DRAWERS, Characters
from metalib.randomness import generator
from metalib.studies import leap_comparison
from metalib.studies.leap_comparison import METHODS, Curves, Protocol
from stages import files, params, study, tables
from stages.command import console, device, keep_heap, one_sentence, tensor_float

NAME = "leap_comparison"
TITLES = {
    "leap": "Leap",
    "reptile": "Reptile",
    "fomaml": "FOMAML",
    "maml": "MAML",
    "finetune": "multi-headed fine-tuning",
    "none": "no pre-training",
}
STYLES = {  # line, marker
    "leap": ("-", "o"),
    "reptile": ("-", "s"),
    "fomaml": ("--", "^"),
    "maml": ("--", "v"),
    "finetune": ("-.", "D"),
    "none": (":", "x"),
}
AREAS = ("loss", "error", "held_out_loss", "held_out_error")
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main() -> None:
    """Write the outputs of study `leap_comparison` (see stages/study.py). METALIB_DEVICE chooses the device."""
    began = time.monotonic()
    file = params.read()
    protocol = params.study(file, NAME, Protocol)
    data = files.load_characters()
    where = device()
    keep_heap()
    tensor_float(False)
    curves = compare(protocol, data, where)
    rows = areas(protocol, curves)
    study.write(
        NAME,
        figure=draw(protocol, curves, rows),
        report=report(protocol, rows, file.studies[NAME], f"{data.source}, {data.drawn}"),
        data={"areas": rows, **points(protocol, curves)},
        metrics=summary(rows),
        where=where,
        began=began,
    )


def compare(protocol: Protocol, data: Characters, where: torch.device) -> dict[tuple[str, int], Curves]:
    """The test alphabets' learning curves of every method at every number of meta-training alphabets, on the CPU."""
    images = torch.from_numpy(data.images).to(where)
    network = leap_comparison.make_network(protocol, images.shape[-1])
    order = [
        leap_comparison.tasks_in_order(data, protocol, generator(seed, NAME, "alphabets")).to(where) for seed in protocol.seeds
    ]

    def generators(*purpose: str | int) -> list[torch.Generator]:
        return [generator(seed, NAME, *purpose, device=where) for seed in protocol.seeds]

    tasks = leap_comparison.held_out_tasks(
        images, [rows[: protocol.test] for rows in order], protocol, generators("test draws")
    )
    curves = dict[tuple[str, int], Curves]()
    for n in protocol.alphabets:
        training = [rows[protocol.test : protocol.test + n] for rows in order]
        for method in METHODS:
            since = time.monotonic()
            if method == "none" and curves.get((method, protocol.alphabets[0])):  # there is nothing it would learn from
                curves[method, n] = curves[method, protocol.alphabets[0]]
                continue
            weights = leap_comparison.meta_train(
                method, protocol, network, images, training, generators("meta-training", n), generators("initial weights")
            )
            trained = time.monotonic() - since
            curves[method, n] = Curves(*(part.cpu() for part in leap_comparison.evaluate(protocol, network, weights, tasks)))
            console.print(
                f"{method}, n = {n}: error on held-out images {100 * curves[method, n].held_out_error[-1].mean():.1f} %; "
                f"meta-training {trained:.0f} s, test {time.monotonic() - since - trained:.0f} s",
                highlight=False,
            )
    return curves


def areas(protocol: Protocol, curves: dict[tuple[str, int], Curves]) -> list[dict[str, Any]]:
    """For each method, number of alphabets and seed: the four areas and the final error, means over the test alphabets."""
    rows = []
    for (method, n), found in curves.items():
        spacing = {"loss": 1, "error": 1, "held_out_loss": protocol.every, "held_out_error": protocol.every}
        under = {
            name: leap_comparison.auc(getattr(found, name), every, protocol.inner_steps).mean(1)
            for name, every in spacing.items()
        }
        final = found.held_out_error[-1].mean(1)
        for r, seed in enumerate(protocol.seeds):
            numbers = {f"auc_{name}": round(float(values[r]), 4) for name, values in under.items()}
            rows.append({"method": method, "alphabets": n, "seed": seed, **numbers, "final_error": round(float(final[r]), 4)})
    return rows


def points(protocol: Protocol, curves: dict[tuple[str, int], Curves]) -> dict[str, list[dict[str, Any]]]:
    """The learning curves, means over seeds and test alphabets."""
    tables_of = {
        "training_batches": ("loss", "error", 1),
        "held_out_images": ("held_out_loss", "held_out_error", protocol.every),
    }
    return {
        table: [
            {"method": method, "alphabets": n, "inner_step": every * i, "loss": f"{loss:.5f}", "error": f"{error:.5f}"}
            for (method, n), found in curves.items()
            for i, (loss, error) in enumerate(zip(*(getattr(found, name).mean((1, 2)).tolist() for name in names), strict=True))
        ]
        for table, (*names, every) in tables_of.items()
    }


def over_seeds(rows: list[dict[str, Any]], method: str, n: int, key: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = torch.tensor([row[key] for row in rows if (row["method"], row["alphabets"]) == (method, n)], dtype=torch.float64)
    return float(values.mean()), float(deviation(values))


def deviation(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation over seeds, the last axis; 0 of a single one."""
    return values.std(-1, correction=min(1, values.shape[-1] - 1))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, by method and number of alphabets."""
    keys = [*(f"auc_{name}" for name in AREAS), "final_error"]
    places = dict.fromkeys((row["method"], row["alphabets"]) for row in rows)
    found = dict[str, Any]()
    for method, n in places:
        found.setdefault(method, {})[f"n{n}"] = {key: round(over_seeds(rows, method, n, key)[0], 4) for key in keys}
    return found


def draw(protocol: Protocol, curves: dict[tuple[str, int], Curves], rows: list[dict[str, Any]]) -> Figure:
    """Left: learning curves at the largest n. Right: areas against n. Above: training batches' loss; below: held-out error."""
    figure = Figure(figsize=(7.1, 5), layout="constrained")
    (above, above_right), (below, below_right) = figure.subplots(2, 2)
    most = protocol.alphabets[-1]
    for method, colour in zip(METHODS, study.COLOURS, strict=False):
        line, marker = STYLES[method]
        look = {"color": colour, "linestyle": line, "linewidth": 1.6}
        found = curves[method, most]
        mean, spread = leap_comparison.smooth(found.loss.mean((1, 2)), protocol.window)
        steps = torch.arange(len(mean)) + (protocol.window - 1) / 2
        above.plot(steps, mean, **look, label=TITLES[method])
        above.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        seeds = 100 * found.held_out_error.mean(2)  # (points, R)
        mean, spread = seeds.mean(1), deviation(seeds)
        steps = protocol.every * torch.arange(len(mean))
        below.plot(steps, mean, **look)
        below.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        for axis, key, unit in ((above_right, "auc_loss", 1), (below_right, "auc_held_out_error", 100)):
            pairs = [over_seeds(rows, method, n, key) for n in protocol.alphabets]
            mean, spread = unit * torch.tensor(pairs).T
            axis.plot(protocol.alphabets, mean, **look, marker=marker, markersize=5)
            axis.fill_between(protocol.alphabets, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    above.set(ylabel="training loss, nats", title=f"Held-out alphabets, n = {most}")
    below.set(ylabel="held-out error, %", xlabel="inner steps")
    above_right.set(ylabel="area, loss, nats", title="Area under these curves")
    below_right.set(ylabel="area, error, %", xlabel="alphabets in meta-training, n")
    for axis in (above_right, below_right):
        axis.set_xticks(protocol.alphabets)
    for axis in (above, below, above_right, below_right):
        axis.grid(alpha=0.3)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def report(protocol: Protocol, rows: list[dict[str, Any]], section: params.Study, data: str) -> str:
    """The study's page."""
    p, most, by = protocol, protocol.alphabets[-1], protocol.augmentation
    ranked = {
        key: ", ".join(
            f"{TITLES[m]} ({over_seeds(rows, m, most, key)[0]:.3f})"
            for m in sorted(METHODS, key=lambda m: over_seeds(rows, m, most, key)[0])
        )
        for key in ("auc_loss", "auc_held_out_error")
    }

    def listed(values: list[int]) -> str:
        return ", ".join(map(str, values))

    def table(key: str, unit: int = 1) -> str:
        digits = 3 if unit == 1 else 1
        cells = [
            [
                TITLES[m],
                *(
                    f"{unit * mean:.{digits}f} ± {unit * std:.{digits}f}"
                    for mean, std in (over_seeds(rows, m, n, key) for n in p.alphabets)
                ),
            ]
            for m in METHODS
        ]
        return tables.markdown(["method", *(f"n = {n}" for n in p.alphabets)], cells)

    joint, paper = p.meta_batch * p.inner_steps, section.paper
    text = [
        "# Leap and its rivals on whole alphabets",
        'Slide "Omniglot Comparison": figure 3 of [Flennerhag et al. 2019](https://arxiv.org/abs/1812.01054), section 4.1; '
        "protocol from the authors' [code](https://github.com/amzn/metalearn-leap). A task is an alphabet, of which "
        f"{p.way} characters are to be told apart after {p.inner_steps} steps of SGD. How fast does a held-out alphabet learn "
        "from initial weights that were meta-trained on n others? Left: mean learning curves at the largest n; right: the area "
        "under such curves, lower is better. Above as published, the loss on each training batch before its update; below the "
        "error on held-out images.",
        f"![Learning curves of held-out alphabets, and areas under them]({NAME}.png)",
        f"*Above left: moving average over {p.window} steps, shaded: standard deviation within the window. Elsewhere shaded: "
        f"standard deviation over {len(p.seeds)} seed(s).*",
        "## Results",
        f"By the area under the training loss at n = {most}: {ranked['auc_loss']}. By the area under the held-out error: "
        f"{ranked['auc_held_out_error']}. All numbers: mean ± standard deviation over seeds.",
        "Area under the loss on training batches, nats:",
        table("auc_loss"),
        "Area under the error on training batches, %:",
        table("auc_error", 100),
        "Area under the loss on held-out images, nats:",
        table("auc_held_out_loss"),
        "Area under the error on held-out images, %:",
        table("auc_held_out_error", 100),
        f"Error on held-out images after {p.inner_steps} steps, %:",
        table("final_error", 100),
        "The area under a curve of T points is the sum of its trapezoids over the number of inner steps, (T - 1) / T for the "
        "training batches of a constant 1. Every seed's numbers and all curves are in "
        f"[plots/studies/{NAME}](../../plots/studies/{NAME}).",
        "## Protocol",
        f"Budget {section.budget}, data {data}. Alphabets of at least {p.way} characters; for each of the seeds "
        f"{listed(p.seeds)}, {p.test} held out for the test and n in {{{listed(p.alphabets)}}} of the "
        "others for meta-training. Within a seed all methods and all n have the same test alphabets, the same images in the "
        "same order there, and the same initial weights; a smaller n has a part of a larger one's alphabets. "
        f"{DRAWERS - p.held_out} images of a character are trained on, {p.held_out} are held out; each is turned by up to "
        f"{by.degrees:g} degrees, scaled by {by.smallest:g} to {by.largest:g} and moved by up to {100 * by.shift:g} % of its "
        "size, anew whenever it is drawn.",
        f"Inner loop: SGD of rate {p.inner_lr:g} on batches of {p.batch} images, {p.inner_steps} steps; MAML has "
        f"{p.maml_steps} in meta-training and, as all methods, {p.inner_steps} in the test. Outer loop: {p.meta_steps} "
        f"meta-steps of {p.meta_batch} tasks, SGD of rate {p.outer_lr.leap:g} (Leap), {p.outer_lr.reptile:g} (Reptile), "
        f"{p.outer_lr.fomaml:g} (FOMAML), {p.outer_lr.maml:g} (MAML); the query set of FOMAML and MAML is one more "
        "batch of the training images. "
        f"Multi-headed fine-tuning: one body and a head for each meta-training alphabet, trained by {p.meta_steps * joint:,} "
        f"steps of SGD on the batches of the same tasks, shuffled within {joint:,}; a test alphabet gets a random head. "
        "Nothing is selected: the last weights are tested.",
        f"Network: four convolutions of {p.filters} filters (down-sampling: {p.downsample}) and a linear head. **Batch norm "
        "takes the statistics of the images at hand, for all methods alike**: of the batch in each step, and of all "
        "held-out images of a task when these are classified.",
        "## What differs from the publication",
        "\n".join(
            f"- {line}"
            for line in (
                f"Published are {paper['meta_steps']:,} meta-steps of {paper['meta_batch']} tasks, {len(paper['seeds'])} "
                f"seeds, n in {{{listed(paper['alphabets'])}}} and down-sampling {paper['downsample']}: budget `paper` of "
                "params.yaml.",
                "The test alphabets are the same for every n; in the authors' code they change with n. Of the remaining "
                "alphabets, which they validate on, none is used.",
                "On held-out images the authors' network takes running statistics (MAML's takes the batch's), in batches; here "
                "all methods' take those of a task's held-out images.",
                "Reptile and Leap use the weights after the last inner step, too, which the authors' code leaves out.",
                "The query loss of MAML is of one fresh batch; the authors' code adds the last training loss.",
                "Convolution, batch norm, ReLU, then down-sampling; in the authors' code the pooling comes before batch norm.",
                "Images are ink 1 on paper 0, and what is moved in from outside is paper. The authors' are ink 0 on paper 1, "
                "binary, and filled with 0: with ink. Augmented images are interpolated bilinearly, theirs take the nearest "
                "pixel.",
            )
        ),
    ]
    return "\n\n".join(text)


if __name__ == "__main__":
    app()
