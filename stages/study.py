"""What every study leaves behind, written together, with a note of when and where it was made."""

import csv
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from stages import files
from stages.command import console, device_name
from stages.compare import COLOURS as COLOURS


def write(
    name: str,
    *,
    figure: Figure,
    report: str,
    data: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, Any],
    where: torch.device,
    began: float,
) -> None:
    """Write what dvc.yaml names as the study's outputs.

    reports/studies/<name>.png and .md: the figure, and the page with caption, tables and protocol (`report`).
    plots/studies/<name>/<table>.csv: each table of `data`.  metrics/studies/<name>.json: the numbers to compare commits by.
    reports/studies/<name>.run.json: commit, device, versions and duration (`began`: time.monotonic()); no metric.
    """
    with files.whole(Path(f"plots/studies/{name}")) as folder:
        folder.mkdir()
        for table, rows in data.items():
            with open(folder / f"{table}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    with files.whole(Path(f"metrics/studies/{name}.json")) as beside:
        beside.write_text(json.dumps(metrics, indent=1) + "\n")
    with files.whole(Path(f"reports/studies/{name}.png")) as beside:
        figure.savefig(beside, dpi=120, format="png", metadata={"Software": None})
    with files.whole(Path(f"reports/studies/{name}.md")) as beside:
        beside.write_text(report.rstrip() + "\n")
    run = {
        "commit": _commit(),
        "device": f"{where.type} ({device_name(where)})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - began),
    }
    with files.whole(Path(f"reports/studies/{name}.run.json")) as beside:
        beside.write_text(json.dumps(run, indent=1) + "\n")
    console.print(f"reports/studies/{name}.md: {run['seconds']} s on {where}")


def _commit() -> str:
    """The commit the study was run on, with "+" where tracked code or params were changed since; "none" outside of git."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "metalib", "stages", "params.yaml")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"
