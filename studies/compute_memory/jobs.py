"""The meta-gradients that are measured, each in a process of its own."""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from statistics import linear_regression
from typing import Any, NamedTuple

import numpy as np
import torch

from metalib import algorithms, meters
from metalib.models import loss
from metalib.models.conv4 import Conv4
from metalib.randomness import generator
from metalib.types import TaskBatch
from stages.command import console, prepared
from studies.compute_memory.schema import Values
from studies.computing import Study

MB = 1e6


class Point(NamedTuple):
    """A row of points.csv."""

    engine: str
    method: str
    steps: int
    mb: float  # that the first meta-gradient adds to the process's peak
    seconds: float


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
    device: str
    threads: int
    seed: int
    repeats: int


def methods(values: Values) -> dict[str, Method]:
    """The figure's lines, by name."""
    rate: dict[str, Any] = {"inner_lr": values.inner_lr}
    whole = rate | {"inner_batch": None}  # the whole support set in each step
    implicit = {"lam": values.lam, "cg_steps": values.cg_steps, "damping": 0.0, "lam_damping": 0.0}
    descent = {"inner_optimiser": "sgd", "proximal": "each", "solver": "cg"}
    return {
        "MAML": Method("maml", whole, values.inner_steps),
        "MAML, recomputing": Method("maml", whole | {"recompute": True}, values.inner_steps),
        "truncated MAML": Method("maml_truncated", rate | {"backprop_steps": values.backprop_steps}, values.inner_steps),
        "FOMAML": Method("fomaml", whole, values.inner_steps),
        "Reptile": Method("reptile", whole | {"inner_optimiser": "sgd"}, values.inner_steps),
        "iMAML": Method("imaml", rate | implicit | descent, values.inner_steps),
        "iMAML, Hessian-free": Method(
            "imaml_hf", {"inner_lr": 1.0, "halvings": values.halvings} | implicit, values.newton_steps
        ),
    }


def points(values: Values, network: dict[str, Any], task: Sequence[torch.Tensor], study: Study) -> Iterator[Point]:
    """Every method with every number of steps, on every engine that serves, each a part of the study.

    Args:
        network: of Conv4, with way and image_size.   task: support x, y, query x, y, each (1, ...).
    Raises: ValueError when a process runs out of memory.
    """
    arrays = [part.numpy() for part in task]
    engines = ["wide", "native"] if loss.engine(Conv4(**network), study.device) == "native" else ["wide"]
    for engine in engines:
        for name, method in methods(values).items():
            for steps in sorted(method.steps):
                job = Job(
                    method.learner, method.hyper | {"inner_steps": steps}, network, arrays, engine, str(study.device),
                    torch.get_num_threads(), values.seed, values.repeats,
                )  # fmt: skip
                what = f"{name} with {steps} inner steps, engine {engine}"
                mb, seconds = study.part(what, lambda _, job=job, what=what: measured(job, what))  # type: ignore[misc]
                yield Point(engine, name, steps, mb, seconds)


def measured(job: Job, what: str) -> tuple[float, float]:
    """MB and seconds of a job."""
    found = in_fresh_process(job, what)
    mb = found.bytes / MB
    console.print(f"{what}: {mb:.1f} MB, {found.seconds:.3f} s", highlight=False)
    return mb, found.seconds


def in_fresh_process(job: Job, what: str) -> meters.Cost:
    """`measure` in a process that has computed nothing yet. It is forked from a server that has loaded the libraries once."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    quietly = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    with ProcessPoolExecutor(1, mp_context=context, initializer=signal.signal, initargs=quietly) as pool:
        try:
            return pool.submit(measure, job).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            raise ValueError(f"{what}: the process ended early, most likely out of memory; lower inner_steps") from None


def measure(job: Job) -> meters.Cost:
    """The cost of the job's meta-gradient, after a tiny one that loads what is loaded on first use."""
    os.environ |= {"METALIB_ENGINE": job.engine, "METALIB_DEVICE": job.device}
    torch.set_num_threads(job.threads)
    device = prepared()
    network = Conv4(**job.network)
    objective = loss.Conv4Loss(network)
    batch = TaskBatch(*(torch.from_numpy(part).to(device) for part in job.task))
    weights = network.init(generator(job.seed, "initial weights", device=device))
    small = TaskBatch(*(part[:, :2] for part in batch[:4]))
    algorithms.build(job.learner, job.hyper | {"inner_steps": 1}).meta_gradient(objective, weights, small)
    learner = algorithms.build(job.learner, job.hyper)
    return meters.measure(lambda: learner.meta_gradient(objective, weights, batch), device, job.repeats)


def slope(points: Sequence[Point], engine: str, method: str) -> float:
    """MB that an inner step adds, by least squares."""
    line = [point for point in points if (point.engine, point.method) == (engine, method)]
    return linear_regression([point.steps for point in line], [point.mb for point in line]).slope
