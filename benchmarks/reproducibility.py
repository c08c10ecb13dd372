"""How far apart the same trainings end on other engines, threads, instructions and devices; each in a process of its own."""

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import report
from metalib.models.loss import engine
from metalib.training import Result
from stages import command, files, meta_train, params

SETTING = "5w1s"
HEAD = ["learner", "computed on", "again", "weights", "largest", "accuracy"]
OLDER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
Model = dict[str, Tensor]
"""A learner's weights, and under "accuracy" that on the validation tasks."""
app = typer.Typer(add_completion=False)


class Means(NamedTuple):
    """What computes a training."""

    name: str
    environment: dict[str, str]


@app.command()
@command.one_sentence
def main(
    steps: Annotated[int, typer.Option(min=1, help="meta-steps")] = 30,
    tasks: Annotated[int, typer.Option(min=1, help="validation tasks")] = 100,
    learners: Annotated[str, typer.Option(help="comma-separated, or all")] = "all",
    out: Annotated[Path, typer.Option()] = report.RESULTS / "reproducibility.md",
    save: Annotated[Path | None, typer.Option(hidden=True, help="train in this process; where the models go")] = None,
) -> None:
    """Write a table of differences. Needs the data: dvc repro split@5w1s."""
    file = params.read()
    names = list(file.algorithms) if learners == "all" else learners.split(",")
    if unknown := [name for name in names if name not in file.algorithms]:
        raise ValueError(f"--learners: {unknown[0]!r} is not among {', '.join(file.algorithms)}")
    cells = [params.cell(file, name, SETTING) for name in names]
    if save is not None:
        models = {cell.algorithm: train(cell, steps, tasks) for cell in cells}
        save_file({f"{name}/{key}": value for name, model in models.items() for key, value in model.items()}, save)
        return
    head = report.header("How reproducible a training is", "benchmarks.reproducibility", torch.device("cpu"))
    found, again = dict[str, dict[str, Model]](), dict[str, dict[str, Model]]()
    every = means(cells[0])
    for one in every:
        typer.echo(one.name)
        found[one.name], again[one.name] = (in_fresh_process(one, steps, tasks, names) for _ in range(2))
    rows = []
    for name in names:
        for one in every:
            model = found[one.name][name]
            repeated, *_ = differences(model, again[one.name][name])
            rows.append([name, one.name, repeated, *differences(found[every[0].name][name], model)])
    report.write(
        out,
        head,
        f"{SETTING}, budget {file.meta_train.budget}, one seed, {steps} meta-steps, over which the rates fall as they do over "
        "a whole training. Each training ran twice, in two processes: *again* is what differs between these. The other columns "
        f"compare it with {every[0].name}. *weights* is the norm of their difference as a part of their norm; *largest* is the "
        "largest difference of a weight as a part of the largest weight of its tensor; *accuracy*, in points, is on the same "
        f"{tasks} validation tasks. 0 is equality to the bit. *SSE4*: the libraries under PyTorch may use no newer "
        "instructions, as on an older processor.",
        report.table(HEAD, rows, left=2),
    )
    typer.echo(f"written: {out}")


def means(cell: params.Cell) -> list[Means]:
    """All there are here; the others are compared with the first."""

    def on(device: str, engine: str, threads: int, name: str = "", **environment: str) -> Means:
        chosen = {"METALIB_DEVICE": device, "METALIB_ENGINE": engine, "OMP_NUM_THREADS": str(threads)} | environment
        return Means(name or f"{device}, {engine}, {threads} thread{'s' * (threads > 1)}", chosen)

    network = params.make_network(cell, way=2, image_size=28)
    engines = dict.fromkeys([engine(network, torch.device("cpu")), "wide"])
    found = [on("cpu", name, threads) for name in engines for threads in (1, 2)]
    found.append(on("cpu", "wide", 1, "cpu, wide, 1 thread, SSE4", **OLDER))
    return [*found, on("cuda", "wide", 1, torch.cuda.get_device_name())] if torch.cuda.is_available() else found


def in_fresh_process(one: Means, steps: int, tasks: int, names: list[str]) -> dict[str, Model]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "models.safetensors"
        options = ["--steps", str(steps), "--tasks", str(tasks), "--learners", ",".join(names), "--save", str(target)]
        command = [sys.executable, "-m", "benchmarks.reproducibility", *options]
        subprocess.run(command, env=os.environ | one.environment, check=True)
        values = load_file(target)
    return {name: {key.partition("/")[2]: v for key, v in values.items() if key.startswith(f"{name}/")} for name in names}


def train(cell: params.Cell, steps: int, tasks: int) -> Model:
    """One seed for some meta-steps, and its validation at the end."""
    device = command.prepared(cell.tf32)
    outer = dataclasses.replace(cell.outer, meta_steps=min(steps, cell.outer.meta_steps), validations=1)
    short = cell.model_copy(update={"outer": outer, "seeds": cell.seeds[:1], "validation_tasks": tasks})
    *_, result = meta_train.train(short, files.load_tasks(SETTING), device)
    assert isinstance(result, Result)
    accuracy = torch.tensor(result.validation[0], dtype=torch.float64)
    return {name: value.cpu().contiguous() for name, value in result.params[0].items()} | {"accuracy": accuracy}


def differences(first: Model, other: Model) -> tuple[str, str, str]:
    """Of all weights, of the one that differs most, and of the accuracy in points."""
    pairs = [(value, other[name] - value) for name, value in first.items() if name != "accuracy"]
    norms = [math.hypot(*(float(part.norm()) for part in parts)) for parts in zip(*pairs, strict=True)]
    largest = max(float(off.abs().max() / value.abs().max().clamp(min=1e-30)) for value, off in pairs)
    points = 100 * float(other["accuracy"] - first["accuracy"])
    return text(norms[1] / norms[0]), text(largest), f"{points:+.2f}" if points else "0"


def text(part: float) -> str:
    return f"{part:.1e}" if part else "0"


if __name__ == "__main__":
    app()
