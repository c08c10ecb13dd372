"""A results file: what was run, on which commit and machine, then tables in Markdown."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from stages import tables
from stages.command import commit, device_name

RESULTS = Path("benchmarks/results")


def header(title: str, module: str, device: torch.device, versions: Mapping[str, str] | None = None) -> str:
    """Title; the command that writes the whole file; commit, device, threads, versions and the load when it began."""
    packages = {"Python": platform.python_version(), "torch": version("torch")} | dict(versions or {})
    chosen = [f"{name}={os.environ[name]}" for name in ("METALIB_DEVICE", "METALIB_ENGINE") if name in os.environ]
    facts = [
        f"commit {commit()}",
        device_name(device),
        f"threads: {torch.get_num_threads()}",
        ", ".join(f"{name} {number}" for name, number in packages.items()),
        f"load average {os.getloadavg()[0]:.1f}",
    ]
    command = " ".join([*chosen, "python -m", module, shlex.join(sys.argv[1:])]).strip()
    return f"# {title}\n\n`{command}`\n\n{'; '.join(facts)}."


def table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A Markdown table of any values, the first `left` columns aligned to the left."""
    return tables.markdown(list(head), [[str(value) for value in row] for row in rows], left=left)


def write(path: Path, *parts: str) -> None:
    """The parts with empty lines between them; empty parts are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
