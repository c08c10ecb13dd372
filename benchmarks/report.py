"""A results file: what was run on what, then tables in Markdown."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from stages.command import device_name

RESULTS = Path("benchmarks/results")


def header(title: str, module: str, device: torch.device, versions: Mapping[str, str] | None = None) -> str:
    """Title, command, device, threads, versions, and how busy the machine was."""
    packages = {"Python": platform.python_version(), "torch": version("torch")} | dict(versions or {})
    chosen = [f"{name}={os.environ[name]}" for name in ("METALIB_DEVICE", "METALIB_ENGINE") if name in os.environ]
    facts = [
        device_name(device),
        f"threads: {torch.get_num_threads()}",
        ", ".join(f"{name} {number}" for name, number in packages.items()),
        f"load average {os.getloadavg()[0]:.1f}",
    ]
    command = " ".join([*chosen, "python -m", module, shlex.join(sys.argv[1:])]).strip()
    return f"# {title}\n\n`{command}`\n\n{'; '.join(facts)}."


def table(head: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> str:
    """A Markdown table; the first `words` columns are words, the others numbers."""
    rule = [":--" if column < words else "--:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in (head, rule, *rows))


def write(path: Path, *parts: str) -> None:
    """The parts with empty lines between them; empty parts are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
