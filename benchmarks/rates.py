"""What a meta-step of a cell costs, measured by training it for a few."""

import dataclasses
import time
from collections.abc import Callable

import torch

from stages import files, meta_train, params

WARM = 5  # meta-steps; on a GPU, recording the graph is one of them
TIMED = {"cuda": 100}  # elsewhere 10


def seconds_per_step(
    cell: params.Cell, algorithm: str, setting: str, where: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Of all the cell's seeds together; the difference of two short trainings, so that start and validation cancel."""
    stored = files.load_tasks(setting)

    def train(steps: int) -> float:
        outer = dataclasses.replace(cell.outer, meta_steps=steps, validate_every=steps)
        short = cell.model_copy(update={"outer": outer, "validation_tasks": 1})
        start = clock()
        list(meta_train.train(short, algorithm, setting, stored, cell.seeds, where, None))
        return clock() - start

    timed = TIMED.get(where.type, 10)
    train(1)
    return max((train(WARM + timed) - train(WARM)) / timed, 1e-6)
