"""Few-shot tasks: drawn as indices, then gathered from one uint8 array on whatever device holds it."""

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
    generator: torch.Generator,
) -> Tasks:
    """Draw tasks, each of `way` classes out of `pool` (N,) in random order and `images` = shot + query of each class.

    Runs on the pool's device without a host round trip. ValueError when the pool is too small.
    """
    device = pool.device
    turns = 4 if rotations == "classes" else 1
    if way > turns * len(pool):
        raise ValueError(f"way: {way} classes in a task, but there are only {turns * len(pool)} to draw from")
    if images > drawers:
        raise ValueError(f"shot + query: {images} images of a class, but each has only {drawers}")
    chosen = torch.rand(count, turns * len(pool), generator=generator, device=device).topk(way).indices
    drawn = torch.rand(count, way, drawers, generator=generator, device=device).topk(images).indices
    if rotations == "tasks":
        rotation = torch.randint(4, (count, way), generator=generator, device=device)
    else:
        rotation = chosen % turns
    return Tasks(pool[chosen // turns], drawn, rotation)


def gather(characters: Tensor, tasks: Tasks, shot: int) -> TaskBatch:
    """The tasks' images out of characters (N, drawers, H, W) uint8, turned, as floats in [0, 1], shot by shot."""
    count, way = tasks.classes.shape
    size = characters.shape[-1]
    pixels = characters[tasks.classes.unsqueeze(-1), tasks.images].flatten(-2)  # (n, way, shot + query, H * W)
    upright = torch.arange(size * size, device=characters.device).view(size, size)
    turned = torch.stack([upright.rot90(k) for k in range(4)]).flatten(1)[tasks.rotations]  # (n, way, H * W)
    x = pixels.gather(-1, turned.unsqueeze(2).expand(pixels.shape)).float().div_(255).unflatten(-1, (1, size, size))
    x = x.transpose(1, 2)  # (n, shot + query, way, 1, H, W)
    y = torch.arange(way, device=characters.device).expand(count, x.shape[1], way)
    return TaskBatch(
        support_x=x[:, :shot].flatten(1, 2),
        support_y=y[:, :shot].flatten(1, 2),
        query_x=x[:, shot:].flatten(1, 2),
        query_y=y[:, shot:].flatten(1, 2),
        classes=4 * tasks.classes + tasks.rotations,
    )


def with_support(batch: TaskBatch) -> TaskBatch:
    """The batch with the support set in front of each query set, as an inductive loss needs it."""
    return batch._replace(
        query_x=torch.cat([batch.support_x, batch.query_x], 1), query_y=torch.cat([batch.support_y, batch.query_y], 1)
    )
