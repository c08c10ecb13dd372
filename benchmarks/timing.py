"""Calls timed in turn, in one process, so that whatever slows the machine for a while slows all of them."""

import statistics
from collections.abc import Callable, Mapping

import torch

from metalib import meters
from stages import command

Seconds = list[float | None]
"""A call's duration in each round; None where the call was left out."""


def prepared(threads: int) -> torch.device:
    """The device, with the process set up as for a training. The alternatives profit from that, too."""
    device = command.prepared()
    if device.type == "mps":
        raise ValueError("mps has no float64 to compare gradients in; use METALIB_DEVICE=cpu")
    torch.set_num_threads(threads)
    return device


def alternate(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, limit: float = float("inf")
) -> dict[str, Seconds]:
    """`repeats` rounds, after one that does not count. A call that would exceed `limit` seconds sits out further rounds."""
    found: dict[str, Seconds] = {name: [] for name in calls}
    for call in calls.values():
        meters.seconds(call, device)
    for _ in range(repeats):
        for name, call in calls.items():
            used = [seconds for seconds in found[name] if seconds is not None]
            another = not used or sum(used) + used[-1] <= limit
            found[name].append(meters.seconds(call, device) if another else None)
    return found


def median(seconds: Seconds) -> float:
    return statistics.median(s for s in seconds if s is not None)


def ratio(these: Seconds, those: Seconds) -> float:
    """How many times as long these take as those: the median over the rounds that have both."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True) if a is not None and b is not None)
