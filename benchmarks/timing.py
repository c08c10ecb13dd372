"""Calls timed in turn, in one process: what slows the machine for a while then slows them all."""

import statistics
from collections.abc import Callable, Mapping

import torch

from metalib.studies.cost import seconds
from stages.command import device, keep_heap, tensor_float

Seconds = list[float | None]
"""A call's duration in each round; None where it was left out."""


def prepared(threads: int) -> torch.device:
    """The device; the process is set up as a training's, which the alternatives gain by as well."""
    where = device()
    if where.type == "mps":
        raise ValueError("mps has no float64 to compare gradients in; use METALIB_DEVICE=cpu")
    torch.set_num_threads(threads)
    tensor_float(False)
    keep_heap()
    return where


def alternate(
    calls: Mapping[str, Callable[[], object]], repeats: int, where: torch.device, limit: float = float("inf")
) -> dict[str, Seconds]:
    """`repeats` rounds, after one that does not count. A call that has used `limit` seconds is left out of further rounds."""
    found: dict[str, Seconds] = {name: [] for name in calls}
    for call in calls.values():
        seconds(call, where)
    for _ in range(repeats):
        for name, call in calls.items():
            used = [seconds for seconds in found[name] if seconds is not None]
            another = not used or sum(used) + used[-1] <= limit
            found[name].append(seconds(call, where) if another else None)
    return found


def median(seconds: Seconds) -> float:
    return statistics.median(s for s in seconds if s is not None)


def ratio(these: Seconds, those: Seconds) -> float:
    """How many times as long these take as those: the median over the rounds that have both."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True) if a is not None and b is not None)
