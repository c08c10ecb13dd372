"""Test a trained algorithm on the setting's stored test tasks."""

import csv
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors.torch import load_file
from typing_extensions import TypedDict

from metalib import algorithms, evaluation
from metalib.comparison import interval
from metalib.complaints import checked
from metalib.models.conv4 import Conv4
from metalib.types import Params
from stages import files
from stages.command import console, one_sentence, prepared
from stages.guard import guarded
from stages.provenance import refuse_misfit

app = typer.Typer(add_completion=False)


class Seed(TypedDict):
    """What became of a training with this seed."""

    seed: int
    best_step: NonNegativeInt
    validation: Annotated[float, Field(ge=0, le=100)]


class Trained(TypedDict):
    """What a model's meta.json says beside the values that it was trained with."""

    seeds: list[Seed]
    versions: dict[str, str]
    device: str
    threads: PositiveInt
    engine: str
    cuda_graph: str | None


@app.command()
@one_sentence
@guarded("evaluate")
def main(
    algorithm: Annotated[str, typer.Argument(help="a file of metalib/algorithms")],
    setting: Annotated[str, typer.Argument(help="for instance 5w1s")],
) -> None:
    """Write the metrics of a trained model, under both protocols and after every number of inner steps.

    metrics/<setting>/<algorithm>.json: accuracies in %; the headline is transductive, after the last step.
    metrics/<setting>/<algorithm>.run.json: what they are of, read from the model's own folder and the stored tasks.
    plots/<setting>/<algorithm>: the learning curve, and the accuracy by inner step.
    results/<setting>/<algorithm>.npz: every task's accuracy.
    """
    folder = files.model_folder(setting, algorithm)
    made = f"meta_train@{algorithm}-{setting}"
    meta = files.load_json(folder / "meta.json", made)
    refuse_misfit(meta, files.load_cell(setting, algorithm))
    with files.readable(folder / "meta.json", made):
        checked(Trained, meta, "model")
    stored = files.load_tasks(setting)
    count = files.load_test_count(setting)
    device = prepared()
    characters = torch.from_numpy(files.load_characters().images).to(device)
    test = stored.test.first(count, "test_tasks").to(device)
    network = Conv4(way=stored.protocol.way, image_size=characters.shape[-1], **meta["network"])
    hyper = meta["learner"] | meta["test"]
    learner = algorithms.build(algorithm, hyper)
    initial = algorithms.build(algorithm, meta["learner"]).init(network.init(torch.Generator()))
    trained, histories = [], []
    for seed in meta["seeds"]:
        file = folder / f"seed{seed['seed']}"
        with files.readable(weights := file.with_suffix(".safetensors"), made):
            trained.append(load_weights(weights, initial))
        with files.readable(history := file.with_suffix(".csv"), made):
            histories.append(load_history(history, seed, meta["outer"]["meta_steps"]))
            if histories[-1].keys() != histories[0].keys():
                raise ValueError("it is not validated at the meta-steps of the other seeds")
    seeds = []
    for model in trained:
        on_device = {name: value.to(device) for name, value in model.items()}
        seeds.append(evaluation.evaluate(learner, network, on_device, characters, test, stored.protocol.shot))
    accuracy = evaluation.Accuracy(*(torch.stack(part).cpu() for part in zip(*seeds, strict=True)))
    metrics = summarise(accuracy) | {"validation": round(sum(s["validation"] for s in meta["seeds"]) / len(seeds), 2)}
    run = {
        "algorithm": algorithm,
        "setting": setting,
        "budget": meta["budget"],
        **stored.protocol._asdict(),
        "tasks": count,
        "seeds": len(seeds),
        "train_shot": meta["train_shot"],
        "train_query": meta["train_query"],
        "train_rotations": meta["rotations"],
        "train_statistics": meta["statistics"],
        **{fact: meta[fact] for fact in ("versions", "device", "threads", "engine", "cuda_graph")},  # of the training
        "meta_steps": meta["outer"]["meta_steps"],
        "meta_batch": meta["outer"]["meta_batch"],
        "inner_steps": hyper["inner_steps"],
    }
    of = {"algorithm": algorithm, "setting": setting}
    with files.whole(files.plots_folder(setting, algorithm)) as beside:
        beside.mkdir(parents=True)
        files.write_csv(beside / "learning_curve.csv", [of | point for point in learning_curve(histories)])
        files.write_csv(beside / "by_step.csv", [of | point for point in by_step(accuracy)])
    files.save_arrays(files.results_file(setting, algorithm), **{k: v.numpy() for k, v in accuracy._asdict().items()})
    files.write_json(files.metrics_file(setting, algorithm), metrics)
    files.write_json(files.run_file(setting, algorithm), run)
    console.print(
        f"{algorithm} {setting}: transductive {metrics['accuracy']:.2f} ± {metrics['ci95']:.2f} %, "
        f"inductive {metrics['inductive']:.2f} ± {metrics['inductive_ci95']:.2f} % on {count} test tasks",
        highlight=False,
    )


def summarise(accuracy: evaluation.Accuracy) -> dict[str, float]:
    """Percentages from accuracies (seeds, steps + 1, tasks): mean over seeds and tasks, interval over tasks."""
    numbers: dict[str, float] = {}
    for name, prefix, values in (("accuracy", "", accuracy.transductive), ("inductive", "inductive_", accuracy.inductive)):
        mean, half = interval(values[:, -1].mean(0))
        numbers |= {name: round(100 * mean, 2), f"{prefix}ci95": round(100 * half, 2)}
        if len(values) > 1:
            numbers[f"{prefix}seed_std"] = round(100 * float(values[:, -1].double().mean(1).std()), 2)
    return numbers


def by_step(accuracy: evaluation.Accuracy) -> list[dict[str, Any]]:
    """Mean accuracy in % after 0, 1, ... inner steps, from accuracies (seeds, steps + 1, tasks)."""
    means = zip(*(values.double().mean((0, 2)).tolist() for values in accuracy), strict=True)
    return [
        {"inner_step": step, "transductive": round(100 * transductive, 2), "inductive": round(100 * inductive, 2)}
        for step, (transductive, inductive) in enumerate(means)
    ]


def learning_curve(histories: list[dict[int, float]]) -> list[dict[str, Any]]:
    """Validation accuracy in % against meta-steps, mean over the seeds' histories."""
    return [
        {"step": step, "validation": round(sum(history[step] for history in histories) / len(histories), 2)}
        for step in sorted(histories[0])
    ]


def load_weights(path: Path, like: Params) -> Params:
    """A seed's; ValueError where they are not finite, or not of the names, shapes and types of `like`."""
    found: Params = load_file(path)
    for name in sorted(found.keys() | like.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name not in like:
            raise ValueError(f"{name} is none of the learner's weights")
        is_, must = (f"{some[name].dtype} {tuple(some[name].shape)}" for some in (found, like))
        if is_ != must:
            raise ValueError(f"{name} is {is_}, not {must}")
        if not found[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    return found


def load_history(path: Path, seed: Seed, last: int) -> dict[int, float]:
    """Meta-step -> validation accuracy in %; ValueError where end and best are not what meta.json says of the seed."""
    with open(path, newline="") as rows:
        points = [(int(row["step"]), float(row["validation"])) for row in csv.DictReader(rows) if row["validation"] != ""]
    found = dict(points)
    if len(found) < len(points) or not all(step >= 0 and 0 <= value <= 100 for step, value in points):
        raise ValueError("steps are to be there once, with a percentage")
    if max(found, default=None) != last:
        raise ValueError(f"it does not end at meta-step {last}")
    if max(found.values()) != seed["validation"] or found.get(seed["best_step"]) != seed["validation"]:
        raise ValueError(f"the best is not {seed['validation']} %, at meta-step {seed['best_step']}, as meta.json says")
    return found


if __name__ == "__main__":
    app()
