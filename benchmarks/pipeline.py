"""What the pipeline costs when there is nothing to compute: the start of each stage, and `dvc repro` with all up to date."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import report
from benchmarks.timing import alternate, median
from stages.command import one_sentence

CPU = torch.device("cpu")  # no accelerator to wait for
app = typer.Typer(add_completion=False)


def python(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


@app.command()
@one_sentence
def main(
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "pipeline.md",
) -> None:
    """Write a table of seconds. Runs from the project's root."""
    pipeline = Path("dvc.yaml")
    if not pipeline.exists():
        raise ValueError(f"{pipeline} is not in this folder; run from the project's root")
    head = report.header("Pipeline", "benchmarks.pipeline", CPU)
    modules = dict.fromkeys(re.findall(r"python -m ((?:stages|studies)\.\w+)", pipeline.read_text()))
    calls = {"python -c pass": python("-c", "pass"), "python -c 'import torch'": python("-c", "import torch")}
    calls |= {f"python -m {module} --help": python("-m", module, "--help") for module in modules}
    calls["dvc --version"] = python("-m", "dvc", "--version")
    seconds = alternate(calls, repeats, CPU)
    repro, remark = repro_seconds(repeats)
    report.write(
        out,
        head,
        "Seconds, medians of processes started in turn.",
        report.table(["command", "seconds"], [[f"`{n}`", f"{median(s):.2f}"] for n, s in (seconds | repro).items()]),
        remark,
    )
    typer.echo(f"written: {out}")


def repro_seconds(repeats: int) -> tuple[dict[str, list[float | None]], str]:
    """Of `dvc status` and `dvc repro`, and a remark. Nothing is timed while a stage is out of date: repro would run it."""
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True)
    if status.returncode:
        return {}, f"`dvc status` failed, so `dvc repro` was not timed: {status.stderr.strip().splitlines()[-1]}"
    changed = json.loads(status.stdout)
    if changed:
        return {}, f"{len(changed)} stages are out of date, so `dvc repro` with nothing to do was not timed."
    calls = {f"dvc {command}": python("-m", "dvc", command) for command in ("status", "repro")}
    return alternate(calls, repeats, CPU), f"`dvc repro` found all of its {stage_count()} stages up to date."


def stage_count() -> int:
    listed = subprocess.run([sys.executable, "-m", "dvc", "stage", "list", "--name-only"], check=True, capture_output=True)
    return len(listed.stdout.split())


if __name__ == "__main__":
    app()
