"""Few-shot tasks: drawn as indices, then gathered from one uint8 array on whatever device holds it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metalib.types import TaskBatch

Rotations = Literal["classes", "tasks", "none"]
"""classes: a character turned by 0, 90, 180, 270 degrees is four classes (Reptile; training only);
tasks: one random turn for each class of each task (MAML, iMAML);  none."""


class Tasks(NamedTuple):
    """n tasks as indices; the first `shot` of a class's images are its support, the others its queries."""

    classes: Tensor  # (n, way) into the array of characters
    images: Tensor  # (n, way, shot + query) drawers of the character
    rotations: Tensor  # (n, way) quarter turns, 0 to 3

    def to(self, device: torch.device) -> "Tasks":
        """The same tasks on another device."""
        return Tasks(*(index.to(device) for index in self))

    def first(self, count: int, what: str) -> "Tasks":
        """The first `count` tasks; ValueError, in the name of the parameter `what`, when there are fewer."""
        if count > len(self.classes):
            raise ValueError(
                f"{what}: {count} tasks asked for, but only {len(self.classes)} are stored; store more or ask for fewer"
            )
        return Tasks(*(index[:count] for index in self))


class Protocol(NamedTuple):
    """What stored tasks are of: every result on them must show it."""

    data: str  # omniglot or glyphs
    images: str  # size and method, for instance "28 px lanczos"
    split: str  # scheme: characters, alphabets or vinyals
    test_rotations: str  # of the stored tasks: tasks or none
    way: int
    shot: int
    query: int


def draw(
    count: int,
    pool: Tensor,
    *,
    way: int,
    images: int,
    drawers: int,
    rotations: Rotations,
    generators: Sequence[torch.Generator],
) -> Tasks:
    """Draw `count` tasks from each generator, those of the first one first, as it draws them whatever the others are.

    A task has `way` classes out of `pool` (N,) in random order and `images` = shot + query of each class. Runs on the pool's
    device without a host round trip. ValueError when the pool is too small.
    """
    shape = (len(generators), count)
    turns = 4 if rotations == "classes" else 1
    if way > turns * len(pool):
        raise ValueError(f"way: {way} classes in a task, but there are only {turns * len(pool)} to draw from")
    if images > drawers:
        raise ValueError(f"shot + query: {images} images of a class, but each has only {drawers}")
    of_classes = torch.empty(*shape, turns * len(pool), device=pool.device)  # lots
    of_images = torch.empty(*shape, way, drawers, device=pool.device)
    turned = torch.empty(*shape, way, dtype=torch.int64, device=pool.device)
    for r, generator in enumerate(generators):
        of_classes[r].uniform_(generator=generator)
        of_images[r].uniform_(generator=generator)
        if rotations == "tasks":
            turned[r].random_(4, generator=generator)
    chosen = of_classes.flatten(0, 1).topk(way).indices
    rotation = turned.flatten(0, 1) if rotations == "tasks" else chosen % turns
    return Tasks(pool[chosen // turns], of_images.flatten(0, 1).topk(images).indices, rotation)


def gather(characters: Tensor, tasks: Tasks, shot: int) -> TaskBatch:
    """The tasks' images out of characters (N, drawers, H, W) uint8, turned, as floats in [0, 1], shot by shot."""
    count, way = tasks.classes.shape
    size = characters.shape[-1]
    # chosen shot by shot, so that support and queries are views of x
    pixels = characters[tasks.classes.unsqueeze(1), tasks.images.mT].flatten(-2)  # (n, shot + query, way, H * W)
    turned = _turned(size, characters.device)[tasks.rotations].unsqueeze(1)  # (n, 1, way, H * W)
    x = pixels.gather(-1, turned.expand(pixels.shape)).float().div_(255).unflatten(-1, (1, size, size))
    y = torch.arange(way, device=characters.device).expand(count, x.shape[1], way)
    return TaskBatch(
        support_x=x[:, :shot].flatten(1, 2),
        support_y=y[:, :shot].flatten(1, 2),
        query_x=x[:, shot:].flatten(1, 2),
        query_y=y[:, shot:].flatten(1, 2),
        classes=torch.add(tasks.rotations, tasks.classes, alpha=4),
    )


@lru_cache
def _turned(size: int, device: torch.device) -> Tensor:
    """(4, H * W): which pixel of an image comes to each place when it is turned by 0, 90, 180, 270 degrees."""
    upright = torch.arange(size * size, device=device).view(size, size)
    return torch.stack([upright.rot90(k) for k in range(4)]).flatten(1)


def with_support(batch: TaskBatch) -> TaskBatch:
    """The batch with the support set in front of each query set, as an inductive loss needs it."""
    return batch._replace(
        query_x=torch.cat([batch.support_x, batch.query_x], 1), query_y=torch.cat([batch.support_y, batch.query_y], 1)
    )
