"""Meta-train one algorithm in one setting."""

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from safetensors.torch import save_file

import metalib
from metalib import algorithms, evaluation, training
from metalib.data import tasks
from metalib.models import native
from metalib.randomness import generator
from metalib.types import TaskBatch
from stages import files, params
from stages.command import console, device, keep_heap, one_sentence, tensor_float

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main(
    algorithm: Annotated[str, typer.Argument(help="a file of metalib/algorithms")],
    setting: Annotated[str, typer.Argument(help="for instance 5w1s")],
) -> None:
    """Write models/<setting>/<algorithm>: seed<i>.safetensors and seed<i>.csv (history) for each seed, and meta.json.

    A training that was killed goes on where its last validation left it. METALIB_DEVICE chooses the device.
    """
    file = params.read()
    cell = params.cell(file, algorithm, setting)
    stored = files.load_tasks(setting)
    where = device()
    keep_heap()
    tensor_float(cell.tf32)
    kept = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints"
    with files.whole(files.model_folder(setting, algorithm)) as folder:
        folder.mkdir()
        began = time.monotonic()
        name = f"{algorithm} {setting}"
        checkpoint = kept / f"{fingerprint(cell, algorithm, setting, where)}.pt"
        try:
            result = follow(name, cell, train(cell, algorithm, setting, stored, cell.seeds, where, checkpoint))
        except training.Diverged as error:
            which = ", ".join(str(cell.seeds[replica]) for replica in error.replicas)
            raise ValueError(f"{name} seed {which}: {error}; lower inner_lr or outer.lr") from None
        seeds = []
        for r, seed in enumerate(cell.seeds):
            save_file({k: v.cpu().contiguous() for k, v in result.params[r].items()}, folder / f"seed{seed}.safetensors")
            write_history(folder / f"seed{seed}.csv", result.history, r)
            seeds.append({"seed": seed, "best_step": result.best_step[r], "validation": round(100 * result.validation[r], 2)})
            console.print(
                f"{name} seed {seed}: best at meta-step {result.best_step[r]}, validation {100 * result.validation[r]:.2f} %"
            )
        console.print(f"{name}: {time.monotonic() - began:.0f} s on {where}")
        meta = {
            "algorithm": algorithm,
            "setting": setting,
            "budget": file.meta_train.budget,
            **stored.protocol,
            **cell.model_dump(exclude={"seeds"}),
            "engine": engine(cell, where),
            "seeds": seeds,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=vars) + "\n")
        if params.cell(params.read(), algorithm, setting) != cell:
            raise ValueError(f"params.yaml changed while {algorithm} {setting} was training; nothing was recorded, run again")


def train(
    cell: params.Cell,
    algorithm: str,
    setting: str,
    stored: files.TaskFile,
    seeds: list[int],
    where: torch.device,
    checkpoint: Path | None,
) -> Iterator[training.Progress | training.Result]:
    """Put data, network, learner and outer loop together; all seeds are trained at once."""
    way, shot = (int(stored.protocol[k]) for k in ("way", "shot"))
    characters = torch.from_numpy(files.load_characters().images).to(where)
    network = params.make_network(cell, way=way, image_size=characters.shape[-1])
    learner = algorithms.build(algorithm, cell.learner)
    tester = algorithms.build(algorithm, cell.learner | cell.test)
    validation = files.first(stored.validation, cell.validation_tasks, "validation_tasks")
    validation = tasks.Tasks(*(index.to(where) for index in validation))
    pool = stored.train.to(where)

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

    def score(weights: metalib.types.Params) -> float:
        accuracy = evaluation.evaluate(tester, network, weights, characters, validation, shot, every_step=False)
        return float(getattr(accuracy, cell.statistics)[-1].mean())

    return training.train(
        learner,
        network.loss if cell.statistics == "transductive" else network.inductive_loss(way * cell.train_shot),
        [network.init(generator(seed, "initial weights", device=where)) for seed in seeds],
        sample,
        score,
        cell.outer,
        generators=[generator(seed, "meta-training tasks", setting, device=where) for seed in seeds],
        checkpoint=checkpoint,
        chunk=chunk(),
    )


def engine(cell: params.Cell, where: torch.device) -> str:
    """Which of the network's two implementations computes whole task losses: native or wide.

    Where a learner takes body and head apart (finetune's joint training, ANIL's inner loop), that is always wide.
    """
    network = params.make_network(cell, way=2, image_size=28)
    weights = network.init(torch.Generator(where))
    return "native" if native.serves(network, weights, torch.zeros(1, 1, 1, 28, 28, device=where)) else "wide"


def chunk() -> int | None:
    """METALIB_CHUNK: tasks of a meta-batch at a time. Not a param: it changes memory, not meaning."""
    asked = os.environ.get("METALIB_CHUNK", "")
    if asked and not (asked.isdecimal() and int(asked)):
        raise ValueError(f"METALIB_CHUNK: {asked!r} is no number of tasks; give 1 or more, or leave it out")
    return int(asked) if asked else None


def fingerprint(cell: params.Cell, algorithm: str, setting: str, where: torch.device) -> str:
    """Of all that determines the result, so that a checkpoint is only ever taken up by the training it belongs to."""
    facts = [cell.model_dump(), algorithm, setting, where.type, engine(cell, where), torch.__version__]
    digest = hashlib.sha256(json.dumps(facts, default=vars).encode())
    code = sorted(path for path in Path(metalib.__path__[0]).rglob("*") if path.suffix in (".py", ".cpp"))
    for path in (files.CHARACTERS, files.tasks_file(setting), Path(__file__), *code):
        digest.update(path.read_bytes())
    return f"{algorithm}-{setting}-{digest.hexdigest()[:16]}"


def follow(name: str, cell: params.Cell, steps: Iterator[training.Progress | training.Result]) -> training.Result:
    """Show the training as it goes, a bar on a terminal and a line per validation elsewhere; returns its result."""
    columns = (
        TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        TextColumn("{task.fields[news]}"),
    )  # fmt: skip
    total = cell.outer.meta_steps
    accuracy, rate, first, began = "", "", None, 0.0
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, rate="", news="")
        for now in steps:
            if isinstance(now, training.Result):
                return now
            if first is None:  # a checkpoint's step, or the first steps, which are slow
                first, began = now.step, time.monotonic()
            else:
                rate = f"{(now.step - first) / (time.monotonic() - began):.1f} steps/s"
            if now.validation is not None:
                accuracy = f"validation {100 * _mean(now.validation):.2f} %"
            news = f"query loss {_mean(now.query_loss):.4f} {accuracy}"
            bar.update(task, completed=now.step, rate=rate, news=news)
            if now.validation is not None and not console.is_terminal:
                console.print(f"{name}: meta-step {now.step} of {total}  {rate}  {news}", highlight=False)
    raise AssertionError("a training ends with its result")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def write_history(path: Path, history: list[training.Progress], replica: int) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "query_loss", "validation"])
        for row in history:
            accuracy = "" if row.validation is None else f"{100 * row.validation[replica]:.2f}"
            writer.writerow([row.step, f"{row.query_loss[replica]:.5f}", accuracy])


if __name__ == "__main__":
    app()
