"""Meta-train one algorithm in one setting."""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from safetensors.torch import save

import metalib
from metalib import algorithms, evaluation, training
from metalib.checkpoint import Checkpoint, keep
from metalib.data import tasks
from metalib.models.loss import Conv4Loss, engine
from metalib.randomness import generator
from metalib.types import Params, TaskBatch
from stages import files, guard, params
from stages.command import console, one_sentence, prepared, stoppable
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
    name = f"{algorithm} {setting}"
    path = files.checkpoint(f"{algorithm}-{setting}-{fingerprint(cell, device)}")
    guard.check()  # the code that was loaded is the code of the fingerprint

    def say(text: str) -> None:
        console.print(f"{name}: {text}", highlight=False)

    say(values(cell))
    with stoppable(name, lambda: goes_on(path)), keep(path, say) as checkpoint:
        began = time.monotonic()
        try:
            result = follow(cell, train(cell, stored, device, checkpoint))
        except training.Diverged as error:
            which = ", ".join(str(cell.seeds[replica]) for replica in error.replicas)
            raise ValueError(f"{name} seed {which}: {error}; nothing is recorded, lower inner_lr or outer.lr") from None
        with files.whole(files.model_folder(setting, algorithm)) as folder:
            folder.mkdir()
            seeds = []
            for r, seed in enumerate(cell.seeds):
                (folder / f"seed{seed}.safetensors").write_bytes(
                    save({k: v.cpu().contiguous() for k, v in result.params[r].items()})
                )
                files.write_csv(folder / f"seed{seed}.csv", history(result.history, r))
                validation = round(100 * result.validation[r], 2)
                seeds.append({"seed": seed, "best_step": result.best_step[r], "validation": validation})
                skipped = sum(row.skipped[r] for row in result.history)
                left_out = f", {skipped} meta-steps skipped (a loss or gradient was not finite)" if skipped else ""
                say(f"seed {seed}: best at meta-step {result.best_step[r]}, validation {validation:.2f} %{left_out}")
            say(f"{time.monotonic() - began:.0f} s on {device}")
            graph = {"cuda_graph": result.graph}
            meta = stored.protocol._asdict() | provenance(cell, device) | graph | {"seeds": seeds}
            files.write_json(folder / "meta.json", meta)


def goes_on(path: Path) -> str:
    """What a training with the checkpoint at `path` does when it is run again."""
    state = Checkpoint(path).load(torch.device("cpu"))
    return f"goes on from meta-step {state['step']}" if state else "starts again"


def train(cell: params.Cell, stored: files.TaskFile, device: torch.device, checkpoint: Checkpoint | None = None) -> Steps:
    """Put data, network, learner and outer loop together; all seeds of the cell are trained at once."""
    way, shot = stored.protocol.way, stored.protocol.shot
    characters = torch.from_numpy(files.load_characters().images).to(device)
    network = params.make_network(cell, way=way, image_size=characters.shape[-1])
    learner = algorithms.build(cell.algorithm, cell.learner)
    tester = algorithms.build(cell.algorithm, cell.learner | cell.test)
    validation = stored.validation.first(cell.validation_tasks, "validation_tasks").to(device)
    pool = stored.train.to(device)

    def sample(randoms: list[torch.Generator], count: int) -> TaskBatch:
        drawn = tasks.draw(
            count, pool, way=way, images=cell.train_shot + cell.train_query, drawers=characters.shape[1],
            rotations=cell.rotations, generators=randoms,
        )  # fmt: skip
        batch = tasks.gather(characters, drawn, cell.train_shot)
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
    code = (Path(metalib.__path__[0]), Path(params.__file__), Path(__file__))
    return files.fingerprint(facts, files.CHARACTERS, files.tasks_file(cell.setting), *code)


def columns(name: str) -> list[ProgressColumn]:
    """Of the progress bar: the bar itself gives way where a terminal is narrow."""
    rate, news = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[news]}")
    return [TextColumn(name), BarColumn(bar_width=None), MofNCompleteColumn(), rate, TimeRemainingColumn(), news]


def follow(cell: params.Cell, steps: Steps) -> training.Result:
    """Show the training as it goes, a bar on a terminal and a line per validation elsewhere; returns its result.

    ValueError at the first validation after an input of the stage has changed.
    """
    name, total = f"{cell.algorithm} {cell.setting}", cell.outer.meta_steps
    accuracy, rate, first, began, ended = "", "", None, 0.0, list[int]()
    with Bar(*columns(name), console=console, disable=not console.is_terminal, expand=True) as bar:
        task = bar.add_task(name, total=total, rate="", news="")
        for now in steps:
            if isinstance(now, training.Result):
                return now
            if first is None:  # a checkpoint's step, or the first steps, which are slow
                first, began = now.step, time.monotonic()
            else:
                rate = f"{(now.step - first) / (time.monotonic() - began):.1f} steps/s"
            if now.diverged != ended:
                ended = now.diverged
                which = ", ".join(str(cell.seeds[replica]) for replica in ended)
                console.print(f"{name} seed {which}: diverged; the others are trained to their end", highlight=False)
            if now.validation is not None:
                accuracy = f"{100 * _mean(now.validation):.2f} %"
            bar.update(task, completed=now.step, rate=rate, news=accuracy)
            if now.validation is not None and not console.is_terminal:
                loss = f"query loss {_mean(now.query_loss):.4f} " if now.step else ""  # no step, no loss
                news = f"{loss}validation {accuracy}"
                console.print(f"{name}: meta-step {now.step} of {total}  {rate}  {news}", highlight=False)
            if now.validation is not None:
                guard.check()  # rather now than after hours; the checkpoint stays
    raise AssertionError("a training ends with its result")


def _mean(values: list[float]) -> float:
    """Over the replicas that have not diverged."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def history(progress: list[training.Progress], replica: int) -> list[dict[str, object]]:
    """A row for each report of the training; no accuracy where it was not validated."""
    return [
        {
            "step": row.step,
            "query_loss": f"{row.query_loss[replica]:.5f}",
            "validation": "" if row.validation is None else f"{100 * row.validation[replica]:.2f}",
            "skipped": row.skipped[replica],
        }
        for row in progress
    ]


if __name__ == "__main__":
    app()
