"""What a call takes: peak memory and seconds, on the CPU and on CUDA devices."""

import ctypes
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """What a call takes."""

    bytes: int  # that its first run adds to the process's peak
    seconds: float  # median of the runs after the first


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> Cost:
    """The cost of `call`. Its bytes can be trusted in a fresh process; memory an earlier call left to reuse is not counted."""
    begin(device)
    before = peak(device)
    call()
    extra = peak(device) - before
    return Cost(extra, statistics.median(seconds(call, device) for _ in range(repeats)))


def begin(device: torch.device) -> None:
    """Free what earlier calls have left, and let `peak` count from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes: the most that this process has had since `begin`, or so far where its record cannot be reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # of this program alone; getrusage's begins with what its parent had
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, to the end of what it leaves to the device."""
    gc.collect()  # so that no call pays for the garbage of the one before
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
