"""What a meta-step of a cell costs, measured by two short trainings."""

import dataclasses
import time
from collections.abc import Callable

import torch

from stages import files, meta_train, params

WARM = 5  # meta-steps; on a GPU, recording the graph is one of them
TIMED = {"cuda": 100}  # meta-steps; 10 on other devices


def seconds_per_step(cell: params.Cell, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one meta-step of all the cell's seeds together; 0 for a learner without meta-steps.

    It is the difference between a longer and a shorter training, so that their start and their validation cancel.
    """
    if cell.outer.meta_steps == 0:
        return 0.0
    stored = files.load_tasks(cell.setting)

    def train(steps: int) -> float:
        outer = dataclasses.replace(cell.outer, meta_steps=steps, validations=1)
        short = cell.model_copy(update={"outer": outer, "validation_tasks": 1})
        start = clock()
        list(meta_train.train(short, stored, device))
        return clock() - start

    timed = TIMED.get(device.type, 10)
    train(1)
    return max((train(WARM + timed) - train(WARM)) / timed, 1e-6)
