"""How a meta-gradient's time grows with tasks, inner steps, shots and ways; tasks sampled and evaluated per second."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import report
from benchmarks.timing import alternate, median, prepared
from benchmarks.work import LEARNERS, Item
from metalib import evaluation
from metalib.data import tasks as few_shot
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from stages import files
from stages.command import one_sentence

GROWN = ("maml", "fomaml", "imaml")
DRAWERS = 20
app = typer.Typer(add_completion=False)


def grown(base: Item, factor: str, times: int) -> Item:
    """`base` with one of its numbers multiplied by `times`."""
    if factor == "inner steps":
        return replace(base, hyper=base.hyper | {"inner_steps": times * base.hyper["inner_steps"]})
    field = {"tasks": "tasks", "shots": "shot", "ways": "way"}[factor]
    return replace(base, **{field: times * getattr(base, field)})


@app.command()
@one_sentence
def main(
    tasks: Annotated[int, typer.Option(min=1, help="in the smallest work")] = 8,
    most: Annotated[int, typer.Option(min=1, help="factor up to which each number is doubled")] = 16,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    limit: Annotated[float, typer.Option(help="seconds for each number; slow ones get fewer rounds")] = 10.0,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "scaling.md",
) -> None:
    """Write a table of times, in which one number of the work grows at a time, and a table of tasks per second."""
    device = prepared(threads)
    head = report.header("Scaling", "benchmarks.scaling", device)
    times = [2**i for i in range(int(math.log2(most)) + 1)]
    rows = []
    for learner in GROWN:
        typer.echo(learner)
        rows += growth_rows(learner, tasks, times, repeats, device, limit)
    typer.echo("sampling and evaluation")
    report.write(
        out,
        head,
        f"Milliseconds per meta-gradient. 1x: 5-way 1-shot, 1 query per class, 1 inner step, {tasks} tasks. Slope: log time "
        "over log size; 1 is proportional.",
        report.table(["learner", "growing", *(f"{n}x" for n in times), "slope"], rows, left=2),
        "## Tasks per second\n\nSampling: drawn and gathered on the device. Evaluation: MAML's adaptation by 1 inner step, and "
        "classification under both protocols before and after it.",
        report.table(["work", "setting", "tasks in a call", "tasks per second"], rate_rows(repeats, device, limit), left=2),
    )
    typer.echo(f"written: {out}")


def growth_rows(
    learner: str, tasks: int, times: list[int], repeats: int, device: torch.device, limit: float
) -> list[list[str]]:
    own = LEARNERS[learner]
    base = Item(learner, way=5, shot=1, query=1, tasks=tasks, hyper=own.hyper | {"inner_steps": 1})
    factors = ("tasks", "inner steps", "shots", "ways")
    calls = {f"{factor} {n}": meta_gradient(grown(base, factor, n), device) for factor in factors for n in times}
    seconds = alternate(calls, repeats, device, limit)
    rows = []
    for factor in factors:
        found = [1000 * median(seconds[f"{factor} {n}"]) for n in times]
        slope = math.log(found[-1] / found[0]) / math.log(times[-1]) if len(times) > 1 else math.nan
        rows.append([learner, factor, *(f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in found), f"{slope:.2f}"])
    return rows


def meta_gradient(item: Item, device: torch.device) -> Callable[[], object]:
    learner, loss = item.make_learner(), Conv4Loss(item.network())
    params, batch = item.data(device)
    return lambda: learner.meta_gradient(loss, params, batch)


def rate_rows(repeats: int, device: torch.device, limit: float) -> list[list[object]]:
    characters = images().to(device)
    pool = torch.arange(len(characters), device=device)
    random = torch.Generator(device).manual_seed(0)
    calls, counts = dict[str, Callable[[], object]](), dict[str, int]()

    def draw(count: int, way: int, shot: int) -> few_shot.Tasks:
        return few_shot.draw(
            count, pool, way=way, images=2 * shot, drawers=characters.shape[1], rotations="classes", generators=[random]
        )

    def sample(count: int, way: int, shot: int) -> Callable[[], object]:
        return lambda: few_shot.gather(characters, draw(count, way, shot), shot)

    def test(count: int, way: int, shot: int) -> Callable[[], object]:
        learner = LEARNERS["maml"].make_learner()
        network = Conv4(way=way, image_size=characters.shape[-1])
        weights = {name: value.to(device) for name, value in network.init(torch.Generator().manual_seed(0)).items()}
        stored = draw(count, way, shot)
        return lambda: evaluation.evaluate(learner, network, weights, characters, stored, shot)

    for way, shot in ((5, 1), (20, 5)):
        for name, count, make in (("sampling", 16, sample), ("evaluation", 64, test)):
            key = f"{name}/{way}-way {shot}-shot"
            calls[key], counts[key] = make(count, way, shot), count
    seconds = alternate(calls, repeats, device, limit)
    return [[*key.split("/"), counts[key], f"{counts[key] / median(seconds[key]):.0f}"] for key in calls]


def images() -> torch.Tensor:
    """The pipeline's characters, (N, drawers, H, W); random ones if it has not run."""
    if files.CHARACTERS.exists():
        return torch.from_numpy(files.load_characters().images)
    return torch.randint(256, (1623, DRAWERS, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    app()
