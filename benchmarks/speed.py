"""Milliseconds per meta-gradient: both of our engines beside every alternative that gives the same gradient."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers, report, work
from benchmarks.peers.network import Call
from benchmarks.timing import Seconds, alternate, median, prepared, ratio
from benchmarks.work import Item
from metalib import algorithms, cuda_graph
from metalib.models.loss import Conv4Loss
from metalib.types import Params, TaskBatch
from stages.command import one_sentence

CHECK_TASKS = 2
TOLERANCE = 1e-6  # relative, in float64: above rounding, even after many inner steps; below the error of any wrong gradient
ENGINES = ("native", "wide")
GRAPH = "wide, graph"  # recorded as a CUDA graph, as a training's meta-step is
OURS = (*ENGINES, GRAPH)
PRODUCT = "matrix product"  # what the engines' arithmetic is compared with
SIDE = 2048  # of the matrices
TARGETS = {  # on the CPU: how many times as fast as the fastest per-task peer, and as vmap
    ("W1", "wide"): (3.5, 1.6),
    ("W1", "native"): (8.0, 3.5),
    ("W3", "wide"): (2.2, 2.0),
    ("W3", "native"): (4.0, 3.5),
    ("W5", "wide"): (2.2, 2.0),
    ("W5", "native"): (4.0, 3.5),
    ("W7", "wide"): (2.2, 2.0),
    ("W7", "native"): (6.5, None),
}
app = typer.Typer(add_completion=False)


class Result(NamedTuple):
    item: Item
    off: dict[str, float]  # relative difference of each gradient from the wide engine's, in float64
    seconds: dict[str, Seconds]  # of those whose gradient is the same, and of PRODUCT
    flop: int | None  # of the loop over tasks


def ours(item: Item, params: Params, batch: TaskBatch, engine: str) -> Call:
    learner, loss = item.make_learner(), Conv4Loss(item.network())

    def call() -> Params:
        os.environ["METALIB_ENGINE"] = engine
        return learner.meta_gradient(loss, params, batch).grads

    return call


def recorded(call: Call) -> Call:
    """The call as a CUDA graph. Each call overwrites what the one before returned."""
    grads = Params()
    launch = cuda_graph.Captured(lambda: grads.update(call()), [], plain_calls=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")
        for _ in range(3):
            launch()

    def again() -> Params:
        launch()
        return grads

    return again


def contestants(item: Item, params: Params, batch: TaskBatch, absent: dict[str, str]) -> dict[str, Call]:
    """Our engines and the peers that have this learner. `absent` says why others are missing, and may grow."""
    calls = {engine: ours(item, params, batch, engine) for engine in ENGINES if engine not in absent}
    if batch.support_x.device.type == "cuda":
        try:
            calls[GRAPH] = recorded(calls["wide"])
        except UserWarning as reason:
            absent[GRAPH] = str(reason)
    for name, prepare in peers.PEERS.items():
        if name.split()[0] not in absent and (call := prepare(item, params, batch)) is not None:
            calls[name] = call
    return calls


def difference(found: Params, expected: Params) -> float:
    """Largest difference of a weight's gradient, relative to that weight tensor's largest one."""
    assert found.keys() == expected.keys() and all(found[name].shape == expected[name].shape for name in expected)
    off = [(found[name] - e).abs().max() / (float(e.abs().max()) or 1.0) for name, e in expected.items()]
    return float(torch.stack(off).max())  # nan if one of them is


def measure(item: Item, device: torch.device, repeats: int, limit: float, absent: dict[str, str]) -> Result:
    small = replace(item, tasks=min(CHECK_TASKS, item.tasks))
    calls = contestants(small, *small.data(device, torch.float64), absent)
    expected = calls["wide"]()
    off = {name: difference(call(), expected) for name, call in calls.items() if name != "wide"}
    same = {"wide", *(name for name, error in off.items() if error <= TOLERANCE)}
    calls = {name: call for name, call in contestants(item, *item.data(device), absent).items() if name in same}
    seconds = alternate({PRODUCT: product(device), **calls}, repeats, device, limit)
    return Result(item, off, seconds, arithmetic(item, device))


def product(device: torch.device) -> Call:
    a, b = torch.rand(2, SIDE, SIDE, device=device)
    return lambda: {"product": a @ b}


def arithmetic(item: Item, device: torch.device) -> int | None:
    """Floating-point operations of the loop over all tasks; None for a learner without a loop."""
    one = replace(item, tasks=1)
    if (call := peers.PEERS["loop"](one, *one.data(device))) is None:
        return None
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) * item.tasks


@app.command()
@one_sentence
def main(
    items: Annotated[str, typer.Option(help="names from benchmarks/work.py with commas between them, or all")] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="rounds; medians over them are reported")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    limit: Annotated[float, typer.Option(help="seconds for each alternative and item; slow ones get fewer rounds")] = 10.0,
    tasks: Annotated[int | None, typer.Option(min=1, help="for a trial: instead of each item's own number")] = None,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "speed.md",
) -> None:
    """Write tables of times, of their ratios beside the targets, and of the differences between the gradients."""
    chosen = {n: replace(item, tasks=tasks or item.tasks) for n, item in work.find(items).items()}
    device = prepared(threads)
    versions, absent = peers.installed()
    head = report.header("Speed of meta-gradients", "benchmarks.speed", device, versions)
    if reason := why_not_native(device):
        absent["native"] = reason
    results = dict[str, Result]()
    for name, item in chosen.items():
        typer.echo(f"{name}: {item}")
        results[name] = measure(item, device, repeats, limit, absent)
        report.write(out, head, *sections(results, absent, device))  # after each item, so that a kill loses only one
    typer.echo(f"written: {out}")


def why_not_native(device: torch.device) -> str | None:
    """Why the compiled engine cannot run here; None if it can."""
    item = work.ITEMS["W1"]
    try:
        ours(item, *item.data(device), "native")()
    except ValueError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------ tables


def sections(results: dict[str, Result], absent: dict[str, str], device: torch.device) -> list[str]:
    names = [n for n in (*OURS, *peers.PEERS) if any(n in r.seconds or n in r.off for r in results.values())]
    engines = [n for n in OURS if n in names]
    untimed = set(algorithms.names()) - {item.learner for item in work.ITEMS.values()}
    return [
        "Milliseconds: medians of calls in turn, in one process, in float32. Images are random: support + query images of "
        "each class. In brackets: how many times as long as our engines, in reverse order of their columns; medians of the "
        "ratios within a round. JAX uses all cores, whatever the number of threads.",
        report.table(
            ["item", "work", *names], [[n, r.item, *(cell(r, name) for name in names)] for n, r in results.items()], left=2
        ),
        "## Against the fastest\n\nHow many times as fast as the fastest peer that goes task by task, and as vmap.",
        report.table(
            ["item", "engine", "fastest per-task peer", "times as fast", "target", "times as fast as vmap", "target"],
            [against(name, r, engine, device) for name, r in results.items() for engine in OURS if engine in r.seconds],
            left=3,
        ),
        "## Arithmetic\n\nGFLOP of the convolutions and products in the loop over tasks, as torch.utils.flop_counter counts "
        f"them; how many of them each engine does in a second, beside those of a product of {SIDE} x {SIDE} matrices.",
        report.table(
            ["item", "GFLOP", *(f"{name}, GFLOP/s" for name in (*engines, PRODUCT))],
            [
                [n, f"{r.flop / 1e9:.1f}", *(f"{r.flop / 1e9 / median(r.seconds[e]):.0f}" for e in engines), one_product(r)]
                for n, r in results.items()
                if r.flop
            ],
        ),
        f"## The same gradient\n\nLargest difference from the wide engine's gradient, in float64, {CHECK_TASKS} tasks, "
        f"relative to each weight tensor's largest. Alternatives with more than {TOLERANCE:g} are not timed.",
        report.table(
            ["item", *(name for name in names if name != "wide")],
            [[n, *(f"{r.off[p]:.0e}" if p in r.off else "" for p in names if p != "wide")] for n, r in results.items()],
        ),
        "\n".join(f"- {name} is absent: {reason}" for name, reason in absent.items()),
        f"Not timed, without an item in benchmarks/work.py: {', '.join(sorted(untimed))}." if untimed else "",
    ]


def cell(result: Result, name: str) -> str:
    if name not in result.seconds:
        return "" if result.off.get(name, 0.0) <= TOLERANCE else "another gradient"
    mine = result.seconds[name]
    text = f"{1000 * median(mine):.1f}" if median(mine) < 0.1 else f"{1000 * median(mine):.0f}"
    others = [] if name in OURS else [f"{ratio(mine, result.seconds[e]):.1f}" for e in OURS[::-1] if e in result.seconds]
    return f"{text} ({', '.join(others)})" if others else text


def against(name: str, result: Result, engine: str, device: torch.device) -> list[str]:
    """A row of the second table."""
    times = {peer: ratio(result.seconds[peer], result.seconds[engine]) for peer in peers.PEERS if peer in result.seconds}
    per_task = {peer: times[peer] for peer in peers.PER_TASK if peer in times}
    fastest = min(per_task, key=per_task.__getitem__, default="no alternative")
    targets = TARGETS.get((name, engine), (None, None)) if device.type == "cpu" else (None, None)
    found = (per_task.get(fastest), times.get("vmap"))
    return [
        name,
        engine,
        fastest,
        *(str(x) if x else "" for pair in zip(map(one_digit, found), targets, strict=True) for x in pair),
    ]


def one_product(result: Result) -> str:
    return f"{2 * SIDE**3 / 1e9 / median(result.seconds[PRODUCT]):.0f}"


def one_digit(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


if __name__ == "__main__":
    app()
