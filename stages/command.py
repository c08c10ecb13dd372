"""What every stage does around its work: one-sentence errors, the device, the process's memory and precision."""

import ctypes
import errno
import functools
import io
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import torch
import typer
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

P = ParamSpec("P")
SURROUNDINGS = (  # what a system lacks, and no code can mend: room, rights, handles
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
CHUNKED = ("meta_train", "protocols")  # the stages whose trainings METALIB_CHUNK divides
FULL = ("file write failed", *map(os.strerror, SURROUNDINGS))  # in the words of torch and of safetensors
console = Console(stderr=False, soft_wrap=True)


def one_sentence(main: Callable[P, None]) -> Callable[P, None]:
    """Turn what a person can cause into a sentence on stderr and exit status 1; a bug keeps its traceback."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        for stream in (sys.stdout, sys.stderr):  # a terminal without ± shows ? and loses no result
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            main(*args, **kwargs)
        except Exception as error:
            if (sentence := _sentence(error, getattr(main, "stage", ""))) is None:
                raise
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(sentence)}", highlight=False)
            raise typer.Exit(getattr(error, "status", 1)) from None

    return wrapped


@contextmanager
def stoppable(name: str, again: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM in this block end in one line, which says what the same command will do, and the usual exit status."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        console.print(f"{name}: stopped; the same command {again()}", highlight=False)
        raise typer.Exit(128 + next(iter(stopped.args), signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _sentence(error: Exception, stage: str) -> str | None:
    """What a person can do about an error in this stage of dvc.yaml; None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return text
    if isinstance(error, OSError) and error.errno in SURROUNDINGS:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{os.strerror(error.errno)}; nothing half-written is left: make room or way, then run the same again"
    if isinstance(error, RuntimeError | SafetensorError) and any(words in text for words in FULL):
        return f"{text}; nothing half-written is left: make room or way, then run the same again"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        remedy = "end what else uses it, then run the same again"
        if stage in CHUNKED:
            remedy = "set METALIB_CHUNK to fewer tasks at a time than outer.meta_batch, or lower outer.meta_batch"
        elif isinstance(error, torch.OutOfMemoryError):
            remedy = "end what else uses the GPU, or compute on the CPU with METALIB_DEVICE=cpu"
        return f"out of memory ({text[:200] or 'host'}); {remedy}"
    return None


def prepared(tf32: bool = False) -> torch.device:
    """The device to compute on; the process keeps freed memory, and float32 products are exact to float32 unless `tf32`."""
    device = chosen_device()
    _keep_heap()
    _tensor_float(tf32)
    return device


def chosen_device() -> torch.device:
    """METALIB_DEVICE (cpu, cuda, cuda:1, mps), or the best there is. Not a param: it changes cost, not meaning."""
    asked = os.environ.get("METALIB_DEVICE") or "auto"
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(asked)
        if chosen.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("another kind of device")
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"METALIB_DEVICE: {asked!r} cannot be used here ({reason}); use auto, cpu, cuda or mps") from None
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # streams and graphs are made on the current device
    return chosen


def commit() -> str:
    """The short hash of HEAD, with "+" if tracked code or parameters have changed since; "none" outside of git."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.cpp", "*.yaml")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _tensor_float(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products to 10 bits (TF32). PyTorch's own default lets convolutions."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = allowed  # there are few shapes and many calls of each; in exact float32, none at all


def _keep_heap() -> None:
    """Tell glibc to keep freed memory: the page faults of handing it back and forth cost a third of a meta-step."""
    if platform.libc_ver()[0] == "glibc":
        libc: Any = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 1 << 28)  # M_TOP_PAD
