"""Peak memory of one meta-gradient against the number of inner steps, each in a fresh process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import peers, report
from benchmarks.speed import ENGINES, ours
from benchmarks.timing import prepared
from benchmarks.work import LEARNERS, PAPERS, Item
from metalib.meters import begin, peak
from stages.command import one_sentence

METHODS = {
    "maml": LEARNERS["maml"],
    "maml, recompute": replace(LEARNERS["maml"], hyper=LEARNERS["maml"].hyper | {"recompute": True}),
    "maml_truncated": LEARNERS["maml_truncated"],
    "fomaml": LEARNERS["fomaml"],
    "imaml": PAPERS["W7"],
}
app = typer.Typer(add_completion=False)


def item_of(method: str, steps: int, tasks: int) -> Item:
    """The method in 5-way 1-shot tasks with one query per class."""
    found = METHODS[method]
    return Item(found.learner, way=5, shot=1, query=1, tasks=tasks, hyper=found.hyper | {"inner_steps": steps})


@app.command()
@one_sentence
def main(
    steps: Annotated[list[int], typer.Option(min=1, help="inner steps")] = [1, 5, 10, 20, 50],  # noqa: B006
    tasks: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "memory.md",
    one: Annotated[str | None, typer.Option(hidden=True, help="method/means: print the bytes of one")] = None,
) -> None:
    """Write a table of MiB: a row for each method and engine, and for MAML as a plain loop over tasks."""
    device = prepared(threads)
    if one is not None:
        method, means = one.split("/")
        typer.echo(extra_bytes(item_of(method, steps[0], tasks), means, device))
        return
    engines = ENGINES if device.type == "cpu" else ENGINES[1:]
    pairs = [*((method, engine) for method in METHODS for engine in engines), ("maml", "loop")]
    head = report.header("Memory of a meta-gradient", "benchmarks.memory", device)
    rows = []
    for method, means in pairs:
        typer.echo(f"{method}, {means}")
        found = [in_fresh_process(f"{method}/{means}", count, tasks, threads) for count in steps]
        rows.append([method, means, *(f"{extra / 2**20:.1f}" for extra in found)])
    report.write(
        out,
        head,
        "MiB that one meta-gradient adds to the peak of a fresh process, by inner steps. 5-way 1-shot, 1 query per class; "
        f"tasks: {tasks}. maml_truncated differentiates the last 2 steps (or the only one), imaml takes 5 steps of CG. loop: "
        "task after task in everyday PyTorch, so that there is the graph of only one task at a time.",
        report.table(["method", "means", *(f"{count} steps" for count in steps)], rows, left=2),
    )
    typer.echo(f"written: {out}")


def in_fresh_process(one: str, steps: int, tasks: int, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", one, "--steps", str(steps)]
    command += ["--tasks", str(tasks), "--threads", str(threads)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def extra_bytes(item: Item, means: str, device: torch.device) -> int:
    tiny = replace(item, tasks=1, hyper=item.hyper | {"inner_steps": 1})
    for work in (tiny, item):  # the first one loads what libraries load on first use
        params, batch = work.data(device)
        call = peers.PEERS["loop"](work, params, batch) if means == "loop" else ours(work, params, batch, means)
        assert call is not None
        begin(device)
        before = peak(device)
        call()
    return peak(device) - before


if __name__ == "__main__":
    app()
