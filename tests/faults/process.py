"""Stages in forked processes, which find everything imported, and the faults that end them."""

import mmap
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
PATIENCE = 120  # seconds after which a process counts as hung
Fault = Callable[[int], None]  # called before the operation of this number, in the process that is to suffer it


class Ended(NamedTuple):
    status: int  # of exit; a signal that ended it is negative
    said: str  # stdout and stderr
    operations: int  # on files of the folder that were begun, or would have been next
    last: str  # of them


def die_before(number: int) -> Fault:
    """The process gets no further than to this operation: the disk is as the one before has left it."""

    def fault(now: int) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def break_off_after(number: int) -> Fault:
    """The first write of more than a byte after this operation began leaves a byte and ends the process, whoever writes.

    The kernel sees to it, so this reaches C++ and Rust, which Python does not hear of.
    """

    def fault(now: int) -> None:
        if now == number:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    return fault


class Process:
    """`work` in a child, forked from here and working in `folder`."""

    def __init__(self, work: Callable[[], object], folder: Path, fault: Fault | None = None):
        self._journal = mmap.mmap(-1, 4096)  # shared: what the child wrote last is there, however it ended
        self._output, output = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            os.close(output)
            return
        try:
            status = 1
            try:
                os.chdir(folder)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.stdout = sys.stderr = open(1, "w", 1, "utf-8", closefd=False)  # noqa: SIM115  # until the end
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self._watch(fault)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                work()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        except BaseException:  # Ctrl-C in the last moment; it comes once, so nothing gets back to pytest
            os._exit(130)

    def _watch(self, fault: Fault | None) -> None:
        """Count what Python is about to do to files of the working folder, and let the fault know before it is done."""

        def hook(event: str, values: tuple[Any, ...]) -> None:
            nonlocal number
            writes = event == "open" and values[2] is not None and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not (writes or event in CHANGES) or not isinstance(values[0], str | bytes | os.PathLike):
                return
            if not os.path.realpath(os.fsdecode(values[0])).startswith(folder):
                return
            note = f"{number + 1} {event} {' '.join(str(value) for value in values[:2] if value is not None)}".encode()[:4000]
            self._journal[: len(note) + 1] = note + b"\0"
            if fault:
                fault(number)
            number += 1

        number, folder = 0, os.path.realpath(".") + os.sep
        sys.addaudithook(hook)

    def runs(self) -> bool:
        """Whether it has not ended yet; its end is kept."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for it; AssertionError when it hangs."""
        said, until = b"", time.monotonic() + patience
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while time.monotonic() < until:
                if selector.select(1):
                    if not (block := os.read(self._output, 1 << 16)):
                        break
                    said += block
            else:
                os.kill(self.pid, signal.SIGKILL)
        os.close(self._output)
        _, status = os.waitpid(self.pid, 0)
        assert time.monotonic() < until, f"hangs: {said.decode()}"
        count, _, last = self._journal[: self._journal.find(b"\0")].decode().partition(" ")
        return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace"), int(count or 0), last)
