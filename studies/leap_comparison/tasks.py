"""Alphabets as tasks: who is in which, and images that are turned, scaled and moved anew each time they are drawn."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metalib.data.omniglot import Characters
from metalib.types import TaskBatch
from studies.leap_comparison.schema import Augmentation, Comparison


def tasks_in_order(data: Characters, asked: Comparison, generator: torch.Generator) -> Tensor:
    """Every alphabet with enough characters, in random order, as `way` random characters of it: indices (alphabets, way).

    The first `test_alphabets` are for the test; the next n are for meta-training on n. So the test is the same for every n, and
    more alphabets include the fewer. ValueError when there are not enough.
    """
    names = list(zip(data.background.tolist(), data.alphabets.tolist(), strict=True))
    members = [[i for i, name in enumerate(names) if name == alphabet] for alphabet in sorted(set(names))]
    members = [indices for indices in members if len(indices) >= asked.way]
    wanted = asked.test_alphabets + max(asked.alphabets)
    if wanted > len(members):
        raise ValueError(
            f"test_alphabets and alphabets: {wanted} alphabets of at least {asked.way} characters are needed, "
            f"but there are {len(members)}; lower one of the two"
        )
    order = torch.randperm(len(members), generator=generator).tolist()
    chosen = [torch.randperm(len(members[a]), generator=generator)[: asked.way] for a in order]
    return torch.stack([torch.tensor(members[a])[which] for a, which in zip(order, chosen, strict=True)])


def meta_batch(
    images: Tensor, classes: list[Tensor], asked: Comparison, steps: int, generators: list[torch.Generator]
) -> tuple[TaskBatch, Tensor]:
    """`meta_batch` tasks for each seed, drawn from its n alphabets; classes R x (n, way).

    The support set holds the images of `steps` inner steps, one batch after the other; the query set is one more batch of the
    same training images. Alphabets come in random order, and again from the start where n is smaller than the meta-batch.

    Returns:
        The tasks, and which of the n alphabets each of them is, (R * meta_batch,).
    """
    parts, which = [], []
    for tasks, generator in zip(classes, generators, strict=True):
        rounds = -(-asked.meta_batch // len(tasks))
        shuffled = torch.rand(rounds, len(tasks), generator=generator, device=tasks.device).argsort(1)
        which.append(shuffled.flatten()[: asked.meta_batch])
        trained = range(asked.held_out_images, images.shape[1])
        count = (steps + 1) * asked.inner_batch
        parts.append(draw(images, tasks[which[-1]], trained, count, asked.augmentation, generator))
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    end = steps * asked.inner_batch
    return TaskBatch(x[:, :end], y[:, :end], x[:, end:], y[:, end:]), torch.cat(which)


def test_tasks(images: Tensor, classes: list[Tensor], asked: Comparison, generators: list[torch.Generator]) -> TaskBatch:
    """Each seed's test alphabets, classes R x (test_alphabets, way): images of all inner steps; as queries, those held out."""
    parts = []
    for tasks, generator in zip(classes, generators, strict=True):
        trained, held_out = range(asked.held_out_images, images.shape[1]), range(asked.held_out_images)
        steps = draw(images, tasks, trained, asked.inner_steps * asked.inner_batch, asked.augmentation, generator)
        queries = draw(images, tasks, held_out, asked.way * asked.held_out_images, asked.augmentation, generator)
        parts.append((*steps, *queries))
    return TaskBatch(*(torch.cat(part) for part in zip(*parts, strict=True)))


def draw(
    images: Tensor, classes: Tensor, drawers: range, count: int, augmentation: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` images of each task in random order, each augmented afresh: x (T, count, 1, H, W) in [0, 1], y (T, count).

    images (N, drawers, H, W) uint8, classes (T, way). Each image of a task is drawn equally often, give or take once, and none
    twice while there are enough (as in the authors' code: a random order of `count` numbers, modulo the number of images).
    """
    tasks, way = classes.shape
    size = way * len(drawers)
    order = torch.rand(tasks, max(count, size), generator=generator, device=images.device).argsort(1)[:, :count] % size
    y = order % way
    pixels = images[classes.gather(1, y), drawers.start + order // way]
    return augment(pixels.flatten(0, 1).float().div_(255), augmentation, generator).view(*y.shape, 1, *images.shape[-2:]), y


def augment(x: Tensor, by: Augmentation, generator: torch.Generator) -> Tensor:
    """Images (B, H, W), each turned, scaled and moved by random amounts of its own."""
    turn, factor, right, down = torch.rand(4, len(x), generator=generator, device=x.device)
    return warp(
        x,
        turn * by.degrees * torch.pi / 180,
        by.smallest + factor * (by.largest - by.smallest),
        by.shift * (2 * right - 1),
        by.shift * (2 * down - 1),
    )


def warp(x: Tensor, angle: Tensor, factor: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Images (B, H, W), turned clockwise by `angle` (radians) and scaled about their centres, then moved by parts of the size.

    A point p of the result takes its value from where it came from, (p - shift) turned back and divided by the factor, by
    bilinear interpolation. Outside the image there is paper, 0.
    """
    right, down = 2 * right, 2 * down  # in affine_grid's coordinates an image is 2 wide, from -1 to 1
    cos, sin = angle.cos() / factor, angle.sin() / factor
    back = torch.stack([cos, sin, -cos * right - sin * down, -sin, cos, sin * right - cos * down], 1).view(-1, 2, 3)
    grid = F.affine_grid(back, [len(x), 1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x.unsqueeze(1), grid, align_corners=False).squeeze(1)
