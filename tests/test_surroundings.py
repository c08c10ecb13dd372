"""What a system lacks is one sentence; what the code lacks keeps its traceback."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from stages import evaluate, files, guard, meta_train, preprocess
from stages.command import console, one_sentence
from studies.leap_comparison import __main__ as leap_comparison
from studies.protocols import __main__ as protocols

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
    (MemoryError("Unable to allocate"), ["out of memory", "Unable to allocate", "end what else uses it"]),
    (RuntimeError(ALLOCATOR), ["out of memory", "end what else uses it"]),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), ["CUDA out of memory. Tried", "METALIB_DEVICE=cpu"]),
])  # fmt: skip
def test_what_a_system_lacks_is_a_sentence(error: Exception, words: list[str]) -> None:
    """Seen failing with a traceback for each."""
    outcome = CliRunner().invoke(failing(error))
    assert outcome.exit_code == 1 and isinstance(outcome.exception, SystemExit)
    assert outcome.output.count("\n") == 1 and all(word in outcome.output for word in words)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, ""), OSError(errno.ENOSPC, "", "elsewhere")])
def test_a_full_disk_is_named(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen failing: a write that finds no room names no file. What names one keeps its name."""
    monkeypatch.chdir(tmp_path)

    def main() -> None:
        with files.whole(Path("data/x")) as beside:
            beside.write_text("half")
            raise error

    app = typer.Typer()
    app.command()(one_sentence(main))
    said = CliRunner().invoke(app).output
    assert said.startswith(f"error: {error.filename}: No space left on device;") and not list(Path("data").iterdir())
    assert error.filename in ("data/x", "elsewhere")


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_cache_without_room_is_named_before_the_training_is_forgotten(
    elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen failing: DVC printed "failed to transfer" and exited with 0; the next `dvc repro` trained again.

    With a small file system of its own as the cache, `dvc repro` itself was tried: it fails, and goes on when there is room.
    """
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / ("shared" if elsewhere else ".dvc/cache")
    cache.mkdir(parents=True)
    if elsewhere:
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc/config.local").write_text(f"[cache]\n    dir = {cache}\n")
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room if Path(path) == cache else pytest.fail(f"{path}"))

    def write(size: int) -> None:
        with files.whole(Path("models/x")) as folder:
            folder.mkdir()
            (folder / "weights").write_bytes(bytes(size))

    write(2000)  # without DVC, nothing goes to its cache
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    write(900)
    with pytest.raises(OSError) as caught:
        write(1100)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(cache))
    assert Path("models/x/weights").stat().st_size == 900 and len(list(Path("models").iterdir())) == 1


@pytest.mark.parametrize("error", [
    KeyError("ci95"), RuntimeError("shapes"), FileNotFoundError(errno.ENOENT, "", "x"), TypeError("x"), OSError("x"),
    SafetensorError("x"), AssertionError(), NotImplementedError(),
])  # fmt: skip
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert CliRunner().invoke(failing(error)).exception is error


@pytest.mark.parametrize("module", [meta_train, protocols, evaluate, preprocess, leap_comparison])
@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError(ALLOCATOR), torch.OutOfMemoryError("x")])
def test_out_of_memory_names_what_the_stage_reads(module: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen failing: METALIB_CHUNK was named by all, though only these trainings read it."""

    def exhausted(*_: object) -> None:
        raise error

    monkeypatch.setattr(guard, "Inputs", exhausted)
    said = CliRunner().invoke(module.app, ["maml", "5w1s"] if module in (meta_train, evaluate) else []).output
    assert said.startswith("error: out of memory (") and said.count("\n") == 1, said
    assert ("METALIB_CHUNK" in said) == ("outer.meta_batch" in said) == (module in (meta_train, protocols))


def test_a_terminal_without_the_sign_shows_another() -> None:
    """Seen failing: the stage had done its work, and ended with an error of the codec."""
    app = typer.Typer()

    @app.command()
    @one_sentence
    def main() -> None:
        console.print("98.7 ± 0.4")

    outcome = CliRunner(charset="ascii").invoke(app)
    assert (outcome.exit_code, outcome.output) == (0, "98.7 ? 0.4\n")
