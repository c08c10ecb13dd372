"""Test a trained algorithm on the setting's stored test tasks."""

import json
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file

from metalib import algorithms, evaluation
from metalib.data.tasks import Tasks
from metalib.models.conv4 import Conv4
from stages import files, params
from stages.command import console, device, keep_heap, one_sentence, tensor_float

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main(
    algorithm: Annotated[str, typer.Argument(help="a file of metalib/algorithms")],
    setting: Annotated[str, typer.Argument(help="for instance 5w1s")],
) -> None:
    """Write metrics/<setting>/<algorithm>.json, and every task's accuracy to results/<setting>/<algorithm>.npz.

    Both protocols, after every number of inner steps; the headline is transductive, after the last step. What was trained is
    read from the model's own folder, so a metric always says what it is of.
    """
    file = params.read()
    folder = files.model_folder(setting, algorithm)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        trained = [load_file(folder / f"seed{seed['seed']}.safetensors") for seed in meta["seeds"]]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no whole trained model ({error}); make it with: dvc repro meta_train@{algorithm}-{setting}"
        ) from None
    stored = files.load_tasks(setting)
    try:
        count = file.budgets[meta["budget"]].settings[f"s{setting}"].test_tasks
    except KeyError as error:
        raise ValueError(f"{params.FILE} has no {error.args[0]} under budgets, where the model of {folder} needs one") from None
    where = device()
    keep_heap()
    tensor_float(False)
    characters = torch.from_numpy(files.load_characters().images).to(where)
    test = Tasks(*(index.to(where) for index in files.first(stored.test, count, "test_tasks")))
    network = Conv4(way=stored.protocol["way"], image_size=characters.shape[-1], **meta["network"])
    learner = algorithms.build(algorithm, meta["learner"] | meta["test"])
    seeds = []
    for model in trained:
        weights = {name: value.to(where) for name, value in model.items()}
        seeds.append(evaluation.evaluate(learner, network, weights, characters, test, stored.protocol["shot"]))
    accuracy = evaluation.Accuracy(*(torch.stack(part).cpu() for part in zip(*seeds, strict=True)))
    summary = summarise(accuracy)
    metrics = {
        **summary,
        "seeds": len(seeds),
        "tasks": count,
        "validation": round(sum(s["validation"] for s in meta["seeds"]) / len(seeds), 2),
        "budget": meta["budget"],
        **{name: stored.protocol[name] for name in ("data", "images", "split", "test_rotations", "query")},
        "train_shot": meta["train_shot"],
        "train_query": meta["train_query"],
        "train_rotations": meta["rotations"],
        "train_statistics": meta["statistics"],
        "engine": meta["engine"],
    }
    files.save_arrays(files.results_file(setting, algorithm), **{k: v.numpy() for k, v in accuracy._asdict().items()})
    with files.whole(files.metrics_file(setting, algorithm)) as beside:
        beside.write_text(json.dumps(metrics, indent=1) + "\n")
    console.print(
        f"{algorithm} {setting}: transductive {metrics['accuracy']:.2f} ± {metrics['ci95']:.2f} %, "
        f"inductive {metrics['inductive']:.2f} ± {metrics['inductive_ci95']:.2f} % on {count} tasks",
        highlight=False,
    )


def summarise(accuracy: evaluation.Accuracy) -> dict[str, object]:
    """Percentages from accuracies (seeds, steps + 1, tasks): mean over seeds and tasks, interval over tasks."""
    numbers: dict[str, object] = {}
    for name, prefix, values in (("accuracy", "", accuracy.transductive), ("inductive", "inductive_", accuracy.inductive)):
        mean, half = evaluation.interval(values[:, -1].mean(0))
        numbers |= {name: round(100 * mean, 2), f"{prefix}ci95": round(100 * half, 2)}
        if len(values) > 1:
            numbers[f"{prefix}seed_std"] = round(100 * float(values[:, -1].double().mean(1).std()), 2)
    for name, values in (("by_step", accuracy.transductive), ("inductive_by_step", accuracy.inductive)):
        by_step = values.double().mean((0, 2)).tolist()
        numbers[name] = {f"k{k}": round(100 * mean, 2) for k, mean in enumerate(by_step)}
    return numbers


if __name__ == "__main__":
    app()
