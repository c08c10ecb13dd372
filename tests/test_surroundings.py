"""What a system lacks is one sentence; what the code lacks keeps its traceback."""

import errno

import pytest
import torch
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from stages.command import console, one_sentence

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


def failing(error: Exception) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @one_sentence
    def main() -> None:
        raise error

    return app


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.ENOSPC, "", "models/x"), ["models/x: No space left on device", "nothing half-written is left"]),
    (OSError(errno.EROFS, "", "data/x"), ["data/x: Read-only file system"]),
    (OSError(errno.EFBIG, ""), ["error: File too large"]),
    (PermissionError(errno.EACCES, "", "data/x"), ["data/x: Permission denied"]),
    (SafetensorError("I/O error: No space left on device (os error 28)"), ["No space left on device"]),
    (MemoryError("Unable to allocate"), ["out of memory", "Unable to allocate", "METALIB_CHUNK", "outer.meta_batch"]),
    (RuntimeError(ALLOCATOR), ["out of memory", "METALIB_CHUNK", "outer.meta_batch"]),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), ["CUDA out of memory. Tried", "METALIB_CHUNK", "outer.meta_batch"]),
])  # fmt: skip
def test_what_a_system_lacks_is_a_sentence(error: Exception, words: list[str]) -> None:
    """Seen failing with a traceback for each."""
    outcome = CliRunner().invoke(failing(error))
    assert outcome.exit_code == 1 and isinstance(outcome.exception, SystemExit)
    assert outcome.output.count("\n") == 1 and all(word in outcome.output for word in words)


@pytest.mark.parametrize("error", [
    KeyError("ci95"), RuntimeError("shapes"), FileNotFoundError(errno.ENOENT, "", "x"), TypeError("x"), OSError("x"),
    SafetensorError("x"), AssertionError(), NotImplementedError(),
])  # fmt: skip
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert CliRunner().invoke(failing(error)).exception is error


def test_a_terminal_without_the_sign_shows_another() -> None:
    """Seen failing: the stage had done its work, and ended with an error of the codec."""
    app = typer.Typer()

    @app.command()
    @one_sentence
    def main() -> None:
        console.print("98.7 ± 0.4")

    outcome = CliRunner(charset="ascii").invoke(app)
    assert (outcome.exit_code, outcome.output) == (0, "98.7 ? 0.4\n")
