"""Train and test every learner under every choice."""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from metalib import algorithms, evaluation, training
from metalib.checkpoint import Checkpoint
from metalib.data import splits
from metalib.data.omniglot import Characters
from metalib.data.tasks import Protocol, Tasks, draw
from metalib.randomness import generator
from metalib.types import Params
from stages import files, meta_train, params
from stages.command import console
from studies.computing import Study
from studies.protocols.choices import Choice, Statistics, choices
from studies.protocols.schema import SETTING, Protocols, Scheme


def shortened(cell: params.Cell, asked: Protocols) -> params.Cell:
    """The learner's cell with the study's share of meta-steps, and its seeds."""
    outer = replace(cell.outer, meta_steps=max(1, round(asked.share * cell.outer.meta_steps)))
    seeds = [cell.seeds[0] + i for i in range(asked.seeds)]
    return cell.model_copy(update={"outer": outer, "seeds": seeds})


def task_file(file: params.File, data: Characters, scheme: Scheme, asked: Protocols) -> files.TaskFile:
    """The characters of a split, its validation tasks as the split stage draws them, and test tasks of the study's own.

    The test tasks have images for the most queries asked for, and rotated classes.
    """
    shape = params.setting(file, SETTING)
    classes = splits.divide(data, replace(file.split, scheme=scheme))

    def drawn(part: str, count: int, query: int, rotations: Literal["tasks", "none"]) -> Tasks:
        return draw(
            count,
            torch.from_numpy(getattr(classes, part)),
            way=shape.way,
            images=shape.shot + query,
            drawers=data.images.shape[1],
            rotations=rotations,
            generators=[generator(file.tasks.seed, part, SETTING)],
        )

    most = max(asked.queries)
    return files.TaskFile(
        train=torch.from_numpy(classes.train),
        validation=drawn("validation", file.tasks.validation, shape.query, "none"),
        test=drawn("test", asked.test_tasks, most, "tasks"),
        protocol=Protocol(
            data=data.source,
            images=data.drawn,
            split=scheme,
            test_rotations="tasks",
            way=shape.way,
            shot=shape.shot,
            query=most,
        ),
    )


def accuracies(
    asked: Protocols,
    cells: Mapping[str, params.Cell],
    stored: Mapping[Scheme, files.TaskFile],
    characters: Tensor,
    study: Study,
) -> dict[str, dict[str, Tensor]]:
    """By choice and learner, the accuracy on each test task, (tasks,), mean over seeds.

    A training, with its tests under all choices that it serves, is a part of the study.

    Args:
        stored: the task file of each split.
        characters: (N, drawers, H, W) uint8, on the device to compute on.
    """
    served: dict[tuple[Scheme, Statistics], list[Choice]] = {}
    for choice in choices(asked):
        served.setdefault((choice.scheme, choice.trained), []).append(choice)

    def measured(name: str, scheme: Scheme, trained: Statistics, checkpoint: Checkpoint) -> dict[str, Tensor]:
        began = time.monotonic()
        models = train(cells[name], trained, stored[scheme], characters.device, checkpoint)
        console.print(f"{name}, split {scheme}, trained with {trained} statistics: {time.monotonic() - began:.0f} s")
        return {
            choice.name: test(cells[name], choice, stored[scheme], characters, models) for choice in served[scheme, trained]
        }

    found: dict[str, dict[str, Tensor]] = {choice.name: {} for choice in choices(asked)}
    for name in cells:
        for scheme, trained in served:
            part = study.part(f"{name}-{scheme}-{trained}", partial(measured, name, scheme, trained))
            for chosen, values in part.items():
                found[chosen][name] = values
    return found


def train(
    cell: params.Cell, statistics: Statistics, stored: files.TaskFile, device: torch.device, checkpoint: Checkpoint
) -> list[Params]:
    """The meta-parameters of each seed; the meta-step is chosen on the validation tasks."""
    *_, result = meta_train.train(cell.model_copy(update={"statistics": statistics}), stored, device, checkpoint)
    assert isinstance(result, training.Result)
    return result.params


def test(cell: params.Cell, choice: Choice, stored: files.TaskFile, characters: Tensor, models: list[Params]) -> Tensor:
    """Accuracy on each test task, (tasks,), mean over seeds."""
    shape, drawn = stored.protocol, stored.test
    rotations = drawn.rotations if choice.rotated else torch.zeros_like(drawn.rotations)
    tasks = Tasks(drawn.classes, drawn.images[..., : shape.shot + choice.query], rotations).to(characters.device)
    network = params.make_network(cell, way=shape.way, image_size=characters.shape[-1])
    learner = algorithms.build(cell.algorithm, cell.learner | cell.test)
    seeds = [evaluation.evaluate(learner, network, p, characters, tasks, shape.shot, every_step=False) for p in models]
    return torch.stack([getattr(accuracy, choice.tested)[-1] for accuracy in seeds]).mean(0).cpu()
