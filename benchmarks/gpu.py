"""The ten-minute check of a GPU: is every learner right on it, is its meta-step one CUDA graph, and where does the time go?

Run it first on a new kind of GPU, after `dvc repro split cells`, which make the tasks it trains on.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks import convolutions, report
from benchmarks.work import LEARNERS
from metalib import algorithms, evaluation, training
from metalib.models.loss import Conv4Loss
from stages import files, meta_train, params
from stages.command import one_sentence, prepared

app = typer.Typer(add_completion=False)
EVERY = 50  # meta-steps between two reports of a training, at which the host waits for the device


@app.command()
@one_sentence
def main(
    settings: Annotated[str, typer.Option(help="comma-separated; the first one is profiled")] = "5w1s,20w1s",
    seeds: Annotated[str, typer.Option(help="trained at once, comma-separated")] = "1,3",
    seconds: Annotated[float, typer.Option(min=0.1, help="to time each training for")] = 1.0,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "gpu.md",
) -> None:
    """Write tables: errors against float64, meta-steps, the kernels of MAML's, convolutions, evaluation."""
    device = prepared()
    if device.type != "cuda":
        raise ValueError(f"METALIB_DEVICE: {device} is no CUDA device; this check is for one")
    began = time.perf_counter()
    parts = [report.header("A GPU, checked", "benchmarks.gpu", device, {"CUDA": str(torch.version.cuda)})]

    def add(text: str) -> None:
        typer.echo(f"{text}\n({time.perf_counter() - began:.0f} s)")
        parts.append(text)
        report.write(out, *parts)

    add(references(device))
    names = settings.split(",")
    for setting in names:
        add(meta_steps(setting, device, [int(count) for count in seeds.split(",")], seconds))
    add(kernels(names[0], device))
    add(evaluations(names[0], device))
    add(implementations(device))


def references(device: torch.device) -> str:
    """Every learner's meta-gradient in float32 on the device beside float64 on the CPU, for one seed."""
    rows = []
    for name, item in LEARNERS.items():
        learner, loss = item.make_learner(), Conv4Loss(item.network())
        found = {}
        for kind in ("reference", "IEEE", "TF32"):
            prepared(tf32=kind == "TF32")
            where, dtype = (torch.device("cpu"), torch.float64) if kind == "reference" else (device, torch.float32)
            start, batch = item.data(where, dtype)
            start = {key: value.unsqueeze(0) for key, value in start.items()}
            found[kind] = training.meta_gradient(learner, loss, start, batch, torch.zeros((), device=where)).grads
        want = found.pop("reference")
        size = max(value.norm() for value in want.values())
        errors = {
            kind: max(float((value.cpu().double() - want[key]).norm() / size) for key, value in grads.items())
            for kind, grads in found.items()
        }
        rows.append([name, *(f"{errors[kind]:.1e}" if size else "-" for kind in ("IEEE", "TF32"))])  # scratch learns nothing
    prepared()
    text = "Error of a meta-gradient in float32 against float64 on the CPU, as a part of its largest tensor's norm."
    return f"{text}\n\n" + report.table(["learner", "IEEE", "TF32"], rows)


class Training(NamedTuple):
    """What a short training showed."""

    start: float  # seconds to the first report
    step: float  # seconds of a meta-step after it
    bytes: int
    refused: str  # why its meta-step was not recorded; empty if it was


@contextmanager
def short(cell: params.Cell, device: torch.device) -> Iterator[Iterator[object]]:
    """A training that reports every 50 meta-steps and is left when the caller has seen enough."""
    outer = dataclasses.replace(cell.outer, meta_steps=1_000_000, validations=1)
    some = cell.model_copy(update={"outer": outer, "validation_tasks": 1})
    yield iter(meta_train.train(some, files.load_tasks(cell.setting), device))


def timed(cell: params.Cell, device: torch.device, seconds: float) -> Training:
    """The cell's meta-step, timed for about as many seconds."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with short(cell, device) as steps, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        began = time.perf_counter()
        next(steps)
        first = time.perf_counter()
        reports = 0
        while reports == 0 or time.perf_counter() - first < seconds:
            next(steps)
            reports += 1
        step = (time.perf_counter() - first) / reports / EVERY
    refused = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    return Training(first - began, step, torch.cuda.max_memory_allocated(), refused[0] if refused else "")


def meta_steps(setting: str, device: torch.device, seeds: list[int], seconds: float) -> str:
    """Each learner's meta-step at budget quick, with as many seeds at once."""
    file, rows, refused = params.read(), [], []
    for name in algorithms.names():
        cell = params.cell(file, name, setting, "quick")
        if cell.outer.meta_steps == 0:
            continue
        found = [timed(cell.model_copy(update={"seeds": list(range(count))}), device, seconds) for count in seeds]
        refused += [f"{name}, {one.refused}" for one in found[:1] if one.refused]
        recorded = "no" if any(one.refused for one in found) else "yes"
        steps = [f"{1e3 * one.step:.2f}" for one in found]
        rows.append([name, cell.outer.meta_batch, recorded, *steps, f"{found[0].start:.1f}", f"{found[-1].bytes / 2**30:.1f}"])
        typer.echo(" ".join(map(str, rows[-1])))
    times = [f"ms, {count} seed{'s' if count > 1 else ''}" for count in seeds]
    head = ["learner", "tasks", "one graph", *times, f"s for the first {EVERY}", f"GiB, {seeds[-1]} seeds"]
    text = f"Meta-steps of budget quick in {setting}, sampling and outer step included."
    return "\n\n".join([text, report.table(head, rows), *refused])


def kernels(setting: str, device: torch.device, learner: str = "maml") -> str:
    """Which kernels a meta-step of MAML consists of."""
    cell = params.cell(params.read(), learner, setting, "quick")
    with short(cell, device) as steps:
        next(steps), next(steps)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            next(steps)
    events = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events) / EVERY
    count = sum(e.count for e in events) / EVERY
    rows = [
        [f"`{e.key[:80]}`".replace("|", " "), f"{e.count / EVERY:.1f}", f"{e.self_device_time_total / EVERY:.1f}"]
        for e in sorted(events, key=lambda e: -e.self_device_time_total)[:20]
    ]
    text = f"A meta-step of {learner} in {setting}, one seed: {count:.0f} kernels and copies, which take {total:.0f} µs."
    return f"{text}\n\n" + report.table(["kernel", "times", "µs"], rows)


def evaluations(setting: str, device: torch.device) -> str:
    """600 tasks, evaluated twice: the first time includes what is done once for each shape."""
    cell = params.cell(params.read(), "maml", setting, "quick")
    stored = files.load_tasks(setting)
    network = params.make_network(cell, way=stored.protocol.way, image_size=28)
    characters = torch.from_numpy(files.load_characters().images).to(device)
    weights = network.init(torch.Generator(device).manual_seed(0))
    some = stored.test.first(min(600, len(stored.test.classes)), "test").to(device)
    learner = algorithms.build("maml", cell.learner | {"inner_steps": 3})
    rows = []
    for number in ("first", "second"):
        began = time.perf_counter()
        float(evaluation.evaluate(learner, network, weights, characters, some, stored.protocol.shot).transductive.mean())
        rows.append([number, f"{time.perf_counter() - began:.2f}"])
    text = f"Evaluation of {len(some.classes)} tasks in {setting}, 3 inner steps of MAML."
    return f"{text}\n\n" + report.table(["time", "seconds"], rows)


def implementations(device: torch.device) -> str:
    """Every implementation of a convolution, each captured, so that launches do not count."""
    rows, names = [], []
    for tf32 in (False, True):
        prepared(tf32=tf32)
        for tasks in (16, 96):
            for layer, size in convolutions.LAYERS.items():
                for product, calls in convolutions.implementations(tasks, 5, size, 64, device).items():
                    flop = 2 * 5 * (-(-size // 2)) ** 2 * 576 * 64 * tasks
                    found = {name: replayed(call) for name, call in calls.items()}
                    names = list(calls)
                    times = [f"{1e6 * t:.0f} ({flop / t / 1e12:.1f})" for t in found.values()]
                    rows.append(["TF32" if tf32 else "IEEE", tasks, layer, product, *times])
    prepared()
    text = "Microseconds (TFLOP/s) of a product of 5 images a task, each task with kernels of its own."
    return f"{text}\n\n" + report.table(["products", "tasks", "layer", "product", *names], rows, left=4)


def replayed(call: Callable[[], object], calls: int = 5, replays: int = 4) -> float:
    """Seconds of a call inside of a CUDA graph."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / replays / calls


if __name__ == "__main__":
    app()
