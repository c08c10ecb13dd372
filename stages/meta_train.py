"""Meta-train one algorithm in one setting."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from safetensors.torch import save_file

import metalib
from metalib import algorithms, evaluation, training
from metalib.data import tasks
from metalib.models.loss import Conv4Loss, engine
from metalib.randomness import generator
from metalib.types import Params, TaskBatch
from stages import files, guard, params
from stages.command import console, one_sentence, prepared
from stages.guard import guarded
from stages.provenance import provenance

app = typer.Typer(add_completion=False)
Steps = Iterator[training.Progress | training.Result]


@app.command()
@one_sentence
@guarded("meta_train")
def main(
    algorithm: Annotated[str, typer.Argument(help="a file of metalib/algorithms")],
    setting: Annotated[str, typer.Argument(help="for instance 5w1s")],
) -> None:
    """Write models/<setting>/<algorithm>: seed<i>.safetensors and seed<i>.csv (history) for each seed, and meta.json.

    A training that was stopped goes on from its last validation. METALIB_DEVICE chooses the device.
    """
    cell = files.load_cell(setting, algorithm)
    stored = files.load_tasks(setting)
    device = prepared(cell.tf32)
    kept = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints"
    checkpoint = kept / f"{fingerprint(cell, device)}.pt"
    name = f"{algorithm} {setting}"
    console.print(f"{name}: {values(cell)}", highlight=False)
    with files.whole(files.model_folder(setting, algorithm)) as folder:
        folder.mkdir()
        began = time.monotonic()
        try:
            result = follow(cell, train(cell, stored, device, checkpoint), resumed=checkpoint.exists())
        except training.Diverged as error:
            which = ", ".join(str(cell.seeds[replica]) for replica in error.replicas)
            raise ValueError(f"{name} seed {which}: {error}; lower inner_lr or outer.lr") from None
        seeds = []
        for r, seed in enumerate(cell.seeds):
            save_file({k: v.cpu().contiguous() for k, v in result.params[r].items()}, folder / f"seed{seed}.safetensors")
            files.write_csv(folder / f"seed{seed}.csv", history(result.history, r))
            validation = round(100 * result.validation[r], 2)
            seeds.append({"seed": seed, "best_step": result.best_step[r], "validation": validation})
            console.print(f"{name} seed {seed}: best at meta-step {result.best_step[r]}, validation {validation:.2f} %")
        console.print(f"{name}: {time.monotonic() - began:.0f} s on {device}")
        files.write_json(folder / "meta.json", stored.protocol._asdict() | provenance(cell, device) | {"seeds": seeds})


def train(cell: params.Cell, stored: files.TaskFile, device: torch.device, checkpoint: Path | None = None) -> Steps:
    """Put data, network, learner and outer loop together; all seeds of the cell are trained at once."""
    way, shot = stored.protocol.way, stored.protocol.shot
    characters = torch.from_numpy(files.load_characters().images).to(device)
    network = params.make_network(cell, way=way, image_size=characters.shape[-1])
    learner = algorithms.build(cell.algorithm, cell.learner)
    tester = algorithms.build(cell.algorithm, cell.learner | cell.test)
    validation = stored.validation.first(cell.validation_tasks, "validation_tasks").to(device)
    pool = stored.train.to(device)

    def sample(randoms: list[torch.Generator], count: int) -> TaskBatch:
        drawn = [
            tasks.draw(
                count,
                pool,
                way=way,
                images=cell.train_shot + cell.train_query,
                drawers=characters.shape[1],
                rotations=cell.rotations,
                generator=random,
            )
            for random in randoms
        ]
        joined = tasks.Tasks(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
        batch = tasks.gather(characters, joined, cell.train_shot)
        return tasks.with_support(batch) if cell.statistics == "inductive" else batch

    def score(weights: Params) -> float:
        accuracy = evaluation.evaluate(tester, network, weights, characters, validation, shot, every_step=False)
        return float(getattr(accuracy, cell.statistics)[-1].mean())

    return training.train(
        learner,
        Conv4Loss(network, None if cell.statistics == "transductive" else way * cell.train_shot),
        [network.init(generator(seed, "initial weights", device=device)) for seed in cell.seeds],
        sample,
        score,
        cell.outer,
        generators=[generator(seed, "meta-training tasks", cell.setting, device=device) for seed in cell.seeds],
        checkpoint=checkpoint,
        chunk=chunk(),
    )


def values(cell: params.Cell) -> str:
    """The resolved values in one line; those of the setting's own section are marked."""

    def group(prefix: str, some: dict[str, object]) -> str:
        return ", ".join(f"{name}={value}{'*' if prefix + name in cell.own else ''}" for name, value in some.items())

    outer = {name: value for name, value in vars(cell.outer).items() if value is not None}
    parts = [
        f"budget {cell.budget}",
        group("", cell.learner),
        group("train.", {"shot": cell.train_shot, "query": cell.train_query}),
        f"test: {group('test.', cell.test)}" if cell.test else "",
        f"network: {group('network.', cell.network)}",
        f"outer: {group('outer.', outer)}",
        f"* from algorithms.{cell.algorithm}.{cell.budget}.s{cell.setting}" if cell.own else "",
    ]
    return "; ".join(part for part in parts if part)


def chunk() -> int | None:
    """METALIB_CHUNK: tasks of a meta-batch to hold in memory at once. Not a param: it changes memory, not meaning."""
    asked = os.environ.get("METALIB_CHUNK", "")
    if asked and not (asked.isdecimal() and int(asked)):
        raise ValueError(f"METALIB_CHUNK: {asked!r} is no number of tasks; give 1 or more, or leave it out")
    return int(asked) if asked else None


def fingerprint(cell: params.Cell, device: torch.device) -> str:
    """Of all that determines the result, so that a checkpoint is only ever taken up by the training it belongs to."""
    network = params.make_network(cell, way=2, image_size=28)
    facts = [cell.model_dump(mode="json"), device.type, engine(network, device), torch.__version__]
    digest = hashlib.sha256(json.dumps(facts).encode())
    code = sorted(path for path in Path(metalib.__path__[0]).rglob("*") if path.suffix in (".py", ".cpp"))
    for path in (files.CHARACTERS, files.tasks_file(cell.setting), Path(__file__), *code):
        digest.update(path.read_bytes())
    return f"{cell.algorithm}-{cell.setting}-{digest.hexdigest()[:16]}"


def columns(name: str) -> list[ProgressColumn]:
    """Of the progress bar: the bar itself gives way where a terminal is narrow."""
    rate, news = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[news]}")
    return [TextColumn(name), BarColumn(bar_width=None), MofNCompleteColumn(), rate, TimeRemainingColumn(), news]


def follow(cell: params.Cell, steps: Steps, resumed: bool = False) -> training.Result:
    """Show the training as it goes, a bar on a terminal and a line per validation elsewhere; returns its result."""
    name, total = f"{cell.algorithm} {cell.setting}", cell.outer.meta_steps
    accuracy, rate, first, began, validated = "", "", None, 0.0, 0
    with Bar(*columns(name), console=console, disable=not console.is_terminal, expand=True) as bar:
        task = bar.add_task(name, total=total, rate="", news="")
        try:
            for now in steps:
                if isinstance(now, training.Result):
                    return now
                if first is None:  # a checkpoint's step, or the first steps, which are slow
                    first, began = now.step, time.monotonic()
                    if resumed:
                        console.print(f"{name}: goes on from meta-step {now.step}", highlight=False)
                else:
                    rate = f"{(now.step - first) / (time.monotonic() - began):.1f} steps/s"
                if now.validation is not None:
                    accuracy, validated = f"{100 * _mean(now.validation):.2f} %", now.step
                    guard.check()  # rather now than after hours; the checkpoint stays
                bar.update(task, completed=now.step, rate=rate, news=accuracy)
                if now.validation is not None and not console.is_terminal:
                    loss = f"query loss {_mean(now.query_loss):.4f} " if now.step else ""  # no step, no loss
                    news = f"{loss}validation {accuracy}"
                    console.print(f"{name}: meta-step {now.step} of {total}  {rate}  {news}", highlight=False)
        except KeyboardInterrupt:
            again = f"goes on from meta-step {validated}" if validated else "starts again"
            console.print(f"{name}: stopped; the same command {again}", highlight=False)
            raise typer.Exit(130) from None
    raise AssertionError("a training ends with its result")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def history(progress: list[training.Progress], replica: int) -> list[dict[str, object]]:
    """A row for each report of the training; no accuracy where it was not validated."""
    return [
        {
            "step": row.step,
            "query_loss": f"{row.query_loss[replica]:.5f}",
            "validation": "" if row.validation is None else f"{100 * row.validation[replica]:.2f}",
        }
        for row in progress
    ]


if __name__ == "__main__":
    app()
