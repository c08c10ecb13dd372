"""Test a trained algorithm on the setting's stored test tasks."""

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file

from metalib import algorithms, evaluation
from metalib.comparison import interval
from metalib.models.conv4 import Conv4
from stages import files
from stages.command import console, one_sentence, prepared
from stages.guard import guarded
from stages.provenance import refuse_misfit

app = typer.Typer(add_completion=False)


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
    try:
        meta = json.loads((folder / "meta.json").read_text())
        trained = [load_file(folder / f"seed{seed['seed']}.safetensors") for seed in meta["seeds"]]
        curve = learning_curve([folder / f"seed{seed['seed']}.csv" for seed in meta["seeds"]])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is not a complete trained model ({error}); make it with: dvc repro meta_train@{algorithm}-{setting}"
        ) from None
    refuse_misfit(meta, files.load_cell(setting, algorithm))
    stored = files.load_tasks(setting)
    count = files.load_test_count(setting)
    device = prepared()
    characters = torch.from_numpy(files.load_characters().images).to(device)
    test = stored.test.first(count, "test_tasks").to(device)
    network = Conv4(way=stored.protocol.way, image_size=characters.shape[-1], **meta["network"])
    hyper = meta["learner"] | meta["test"]
    learner = algorithms.build(algorithm, hyper)
    seeds = []
    for model in trained:
        weights = {name: value.to(device) for name, value in model.items()}
        seeds.append(evaluation.evaluate(learner, network, weights, characters, test, stored.protocol.shot))
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
        files.write_csv(beside / "learning_curve.csv", [of | point for point in curve])
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


def learning_curve(histories: list[Path]) -> list[dict[str, Any]]:
    """Validation accuracy in % against meta-steps, mean over the seeds' histories."""
    by_step: dict[int, list[float]] = {}
    for history in histories:
        with open(history, newline="") as rows:
            for row in csv.DictReader(rows):
                if row["validation"]:
                    by_step.setdefault(int(row["step"]), []).append(float(row["validation"]))
    return [{"step": step, "validation": round(sum(values) / len(values), 2)} for step, values in sorted(by_step.items())]


if __name__ == "__main__":
    app()
