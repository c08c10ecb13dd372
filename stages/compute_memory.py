"""What a meta-gradient takes, memory and time, against the number of inner steps."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from statistics import linear_regression
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from metalib import algorithms
from metalib.algorithms import describe
from metalib.data import tasks
from metalib.models import native
from metalib.models.conv4 import Conv4
from metalib.randomness import generator
from metalib.studies import cost
from metalib.types import TaskBatch
from stages import files, params, study, tables
from stages.command import console, device, keep_heap, one_sentence, tensor_float

app = typer.Typer(add_completion=False)
NAME = "compute_memory"
MB = 1e6
Steps = Annotated[list[PositiveInt], Field(min_length=2)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Kind:
    """The study's numbers."""

    seed: int = Field(ge=0)
    way: int = Field(ge=2)
    shot: PositiveInt
    query: PositiveInt
    network: dict[str, Any]
    inner_lr: PositiveFloat
    inner_steps: Steps
    newton_steps: Steps  # of the Hessian-free solver
    backprop_steps: PositiveInt  # of truncated MAML
    lam: PositiveFloat
    cg_steps: PositiveInt
    halvings: int = Field(ge=0)  # of the Hessian-free solver's line search, at most
    repeats: PositiveInt  # that are timed, after a first one


class Method(NamedTuple):
    """A line of the figure."""

    learner: str
    hyper: dict[str, Any]  # all but the number of inner steps
    steps: list[int]


class Job(NamedTuple):
    """What a process measures: one meta-gradient."""

    learner: str
    hyper: dict[str, Any]
    network: dict[str, Any]
    task: list[np.ndarray]  # support x, y, query x, y, each (1, ...)
    engine: str
    where: str
    threads: int
    seed: int
    repeats: int


class Row(NamedTuple):
    """A measured point."""

    engine: str
    method: str
    steps: int
    mb: float  # added to the process's peak by the first meta-gradient
    seconds: float


def methods(kind: Kind) -> dict[str, Method]:
    """The lines, by name."""
    rate: dict[str, Any] = {"inner_lr": kind.inner_lr}
    implicit = {"lam": kind.lam, "cg_steps": kind.cg_steps, "damping": 0.0, "lam_damping": 0.0}
    descent = {"inner_optimiser": "sgd", "proximal": "each", "solver": "cg"}
    whole_set = {"inner_batch": None, "inner_optimiser": "sgd", "moments": "reset"}
    return {
        "MAML": Method("maml", rate, kind.inner_steps),
        "MAML, recomputing": Method("maml", rate | {"recompute": True}, kind.inner_steps),
        "truncated MAML": Method("maml_truncated", rate | {"backprop_steps": kind.backprop_steps}, kind.inner_steps),
        "FOMAML": Method("fomaml", rate, kind.inner_steps),
        "Reptile": Method("reptile", rate | whole_set, kind.inner_steps),
        "iMAML": Method("imaml", rate | implicit | descent, kind.inner_steps),
        "iMAML, Hessian-free": Method("imaml_hf", {"inner_lr": 1.0, "halvings": kind.halvings} | implicit, kind.newton_steps),
    }


@app.command()
@one_sentence
def main() -> None:
    """Write the study compute_memory: figure, page, measured points, metrics.

    Each point is measured in a process of its own. METALIB_DEVICE chooses the device; on the CPU both engines are measured.
    """
    began = time.monotonic()
    file = params.read()
    kind = params.study(file, NAME, Kind)
    budget = file.studies[NAME].budget
    images = torch.from_numpy(files.load_characters().images)
    where = device()
    shape: dict[str, Any] = {"way": kind.way, "image_size": images.shape[-1]}
    try:
        network = Conv4(**shape, **kind.network)
    except ValidationError as error:
        raise ValueError(describe(error, f"studies.{NAME}.{budget}.network")) from None
    drawn = tasks.draw(
        1, torch.arange(len(images)), way=kind.way, images=kind.shot + kind.query, drawers=images.shape[1],
        rotations="none", generator=generator(kind.seed, NAME),
    )  # fmt: skip
    task = [part.numpy() for part in tasks.gather(images, drawn, kind.shot)[:4]]
    jobs = {
        (engine, name, steps): Job(
            method.learner, method.hyper | {"inner_steps": steps}, shape | kind.network, task, engine, str(where),
            torch.get_num_threads(), kind.seed, kind.repeats,
        )
        for engine in engines(network, where)
        for name, method in methods(kind).items()
        for steps in sorted(method.steps)
    }  # fmt: skip
    rows = list[Row]()
    for (engine, name, steps), job in jobs.items():
        found = in_fresh_process(job, f"{name} with {steps} inner steps, engine {engine}")
        rows.append(Row(engine, name, steps, found.bytes / MB, found.seconds))
        console.print(f"{engine}, {name}, {steps}: {rows[-1].mb:.1f} MB, {rows[-1].seconds:.3f} s", highlight=False)
    slopes = {
        engine: {name: slope(rows, engine, name) for name in methods(kind)} for engine in dict.fromkeys(r.engine for r in rows)
    }
    study.write(
        NAME,
        figure=draw(rows, where),
        report=report(kind, budget, where, rows, slopes),
        data={"points": [row._asdict() | {"mb": round(row.mb, 2), "seconds": float(f"{row.seconds:.4g}")} for row in rows]},
        metrics={
            "mb_per_inner_step": {e: {n: round(value, 3) for n, value in found.items()} for e, found in slopes.items()},
            "device": where.type,
            "budget": budget,
        },
        where=where,
        began=began,
    )


def engines(network: Conv4, where: torch.device) -> list[str]:
    """The network's engines that can serve here."""
    weights = network.init(torch.Generator(where))
    size = network.image_size
    served = native.serves(network, weights, torch.zeros(1, 1, 1, size, size, device=where))
    return ["wide", "native"] if served else ["wide"]


def in_fresh_process(job: Job, what: str) -> cost.Cost:
    """`measure` in a process that has computed nothing before; its server has loaded the libraries once for all."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "stages.study", "metalib.models.conv4"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, job).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            raise ValueError(f"{what} did not end, which is mostly for want of memory; lower inner_steps") from None


def measure(job: Job) -> cost.Cost:
    """The cost of the job's meta-gradient, after a tiny one that loads what is loaded on first use."""
    os.environ["METALIB_ENGINE"] = job.engine
    torch.set_num_threads(job.threads)
    where = torch.device(job.where)
    keep_heap()
    tensor_float(False)
    network = Conv4(**job.network)
    batch = TaskBatch(*(torch.from_numpy(part).to(where) for part in job.task))
    weights = network.init(generator(job.seed, "initial weights", device=where))
    small = TaskBatch(*(part[:, :2] for part in batch[:4]))
    algorithms.build(job.learner, job.hyper | {"inner_steps": 1}).meta_gradient(network.loss, weights, small)
    learner = algorithms.build(job.learner, job.hyper)
    return cost.measure(lambda: learner.meta_gradient(network.loss, weights, batch), where, job.repeats)


def slope(rows: list[Row], engine: str, method: str) -> float:
    """MB that an inner step adds, by least squares."""
    line = [row for row in rows if (row.engine, row.method) == (engine, method)]
    return linear_regression([row.steps for row in line], [row.mb for row in line]).slope


def draw(rows: list[Row], where: torch.device) -> Figure:
    """Memory and time against inner steps, a row for each engine."""
    shown = list(dict.fromkeys(row.engine for row in rows))
    names = list(dict.fromkeys(row.method for row in rows))
    figure, axes = plt.subplots(len(shown), 2, figsize=(10, 0.9 + 3.1 * len(shown)), layout="constrained", squeeze=False)
    markers = ["o", "s", "v", "^", "D", "P", "X"]
    for (memory, duration), engine in zip(axes, shown, strict=True):
        for i, name in enumerate(names):
            line = [row for row in rows if (row.engine, row.method) == (engine, name)]
            style = {"color": study.COLOURS[i], "marker": markers[i], "linestyle": "-" if i % 2 else "--", "markersize": 4}
            memory.plot([row.steps for row in line], [row.mb for row in line], label=name, **style)
            duration.plot([row.steps for row in line], [row.seconds for row in line], **style)
        place = f"engine {engine}" if where.type == "cpu" else where.type
        memory.set(title=f"peak memory, {place}", ylabel="MB", ylim=(0, None))
        duration.set(title=f"time, {place}", ylabel="seconds", yscale="log")
    for axis in axes.flat:
        axis.set(xlabel="inner steps (Hessian-free: Newton directions)")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def report(kind: Kind, budget: str, where: torch.device, rows: list[Row], slopes: dict[str, dict[str, float]]) -> str:
    """The study's page."""
    network = ", ".join(f"{key} {value}" for key, value in kind.network.items())
    text = [
        "# Compute and memory",
        "Slide \"Complexity\" (iMAML), the figure's right half; Rajeswaran et al. 2019, figure 2 "
        "([arXiv 1909.04630](https://arxiv.org/abs/1909.04630)). MAML keeps the graph of all inner steps, so its memory grows "
        "with them; implicit MAML needs the solution alone, and its memory does not.",
        f"Budget {budget}: one task of {kind.way}-way {kind.shot}-shot with {kind.query} queries a class, "
        f"{kind.way * kind.shot} + {kind.way * kind.query} images, network: {network}; float32, {where.type}, "
        f"{torch.get_num_threads()} thread(s). Memory: what the first meta-gradient adds to the peak of a fresh process"
        + (" (of the CUDA allocator)" if where.type == "cuda" else " (resident set)")
        + f"; time: median of {kind.repeats} further one(s). Inner rate {kind.inner_lr:g}, lam {kind.lam:g}, {kind.cg_steps} "
        f"CG steps; truncated MAML differentiates the last {kind.backprop_steps} steps; a step of the Hessian-free solver is "
        f"a Newton direction of {kind.cg_steps} CG steps and a line search.",
        f"![Peak memory and time against inner steps]({NAME}.png)",
    ]  # fmt: skip
    header = ["method", "MB per inner step", "fewest steps", "MB", "seconds", "most steps", "MB", "seconds"]
    for engine, found in slopes.items():
        table = []
        for name, value in found.items():
            line = [row for row in rows if (row.engine, row.method) == (engine, name)]
            ends = [[str(row.steps), f"{row.mb:.0f}", f"{row.seconds:.3g}"] for row in (line[0], line[-1])]
            table.append([name, f"{value:.2f}", *ends[0], *ends[1]])
        text += [f"## Engine {engine}", tables.markdown(header, table)]
    engine_notes = "The graph of an inner step holds its activations, on engine wide, which is made of PyTorch's operators."
    if "native" in slopes:
        engine_notes += (
            " Engine native, compiled code, keeps no activations and computes them again: there a graph holds weights alone, "
            "and MAML's memory grows by a few copies of them a step."
        )
    text += [
        engine_notes + " MAML that recomputes keeps a copy of the weights for each step.",
        "## What differs from the publication",
        "The authors measure on a GPU, against an implementation of MAML by others. Here MAML is of second order, one code for "
        "all methods; the numbers are of this machine (beside this page: device, threads, versions).",
    ]  # fmt: skip
    return "\n\n".join(text)


if __name__ == "__main__":
    app()
