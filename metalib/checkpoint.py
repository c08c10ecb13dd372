"""A training's state in one file, so that a training that was killed goes on where it was."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metalib import files

DIGEST = hashlib.sha256().digest_size  # bytes of it, before the state


@dataclass(frozen=True)
class Checkpoint:
    """The file is there whole or not at all, and begins with its content's SHA-256."""

    path: Path
    say: Callable[[str], object] = print

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The state that was saved last, its tensors on `device`; None when there is none.

        A damaged file is none: it is removed, and `say` is told.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        state = content[DIGEST:]
        if hashlib.sha256(state).digest() != content[:DIGEST]:
            self.say(f"{self.path} is damaged, so what it holds is not used, and the training starts afresh")
            self.path.unlink()
            return None
        found: dict[str, Any] = torch.load(io.BytesIO(state), map_location=device, weights_only=True)
        return found

    def save(self, **state: Any) -> None:
        """Replace what was saved before; numbers, strings, tensors, and lists and dicts of them."""
        content = io.BytesIO()
        torch.save(state, content)
        try:
            with files.whole(self.path) as beside:
                beside.write_bytes(hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}); when that is mended, the same command goes on from the "
                "validation before"
            ) from None


@contextlib.contextmanager
def keep(path: Path, say: Callable[[str], object] = print) -> Iterator[Checkpoint]:
    """The checkpoint at `path`, for one process at a time; when the block has ended well, its file is removed.

    So what a training led to should be written inside. Another process with the same training waits, which `say` is told, and
    is left the file: it takes up where the first one ended, or was stopped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = path.with_suffix(".wanted")  # shared by those that wait
    with contextlib.ExitStack() as held:
        with files.locked(wanted, shared=True):
            held.enter_context(
                files.locked(path.with_suffix(".lock"), wait=lambda: say("the same training runs in another process; waiting"))
            )
        yield Checkpoint(path, say)
        with contextlib.suppress(BlockingIOError), files.locked(wanted, wait=None):
            path.unlink(missing_ok=True)
