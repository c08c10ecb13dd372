"""A training's state in one file, so that a training that was killed goes on where it was."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Checkpoint:
    """The file is there whole or not at all; without a path nothing is kept."""

    path: Path | None

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The state that was saved last, its tensors on `device`; None when there is none."""
        if self.path is None or not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        return state

    def save(self, **state: Any) -> None:
        """Replace what was saved before; numbers, strings, tensors, and lists and dicts of them."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        torch.save(state, beside)
        os.replace(beside, self.path)

    def remove(self) -> None:
        """A finished training leaves none."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
