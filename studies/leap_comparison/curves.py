"""Learning curves of the test alphabets, and the area under them."""

import time
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalib import inner, tree
from metalib.checkpoint import Checkpoint
from metalib.data.omniglot import Characters
from metalib.models import wide
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from metalib.randomness import generator
from metalib.types import Params, TaskBatch
from stages.command import console
from studies.computing import Study
from studies.leap_comparison import methods, tasks
from studies.leap_comparison.schema import Comparison


class Curves(NamedTuple):
    """Each (points, R, tasks); errors are fractions."""

    loss: Tensor  # on the batch of inner step 0, 1, ..., before its update
    error: Tensor
    held_out_loss: Tensor  # on the held-out images, after 0, measure_every, ..., inner_steps steps
    held_out_error: Tensor


def compare(asked: Comparison, data: Characters, study: Study) -> dict[tuple[str, int], Curves]:
    """The test alphabets' learning curves, on the CPU, of every method after meta-training on every number of alphabets."""
    device = study.device
    images = torch.from_numpy(data.images).to(device)
    network = methods.make_network(asked, images.shape[-1])
    purpose = "leap_comparison"
    order = [tasks.tasks_in_order(data, asked, generator(seed, purpose, "alphabets")).to(device) for seed in asked.seeds]

    def generators(*purposes: str | int) -> list[torch.Generator]:
        return [generator(seed, purpose, *purposes, device=device) for seed in asked.seeds]

    test = tasks.test_tasks(images, [rows[: asked.test_alphabets] for rows in order], asked, generators("test draws"))

    def curves(method: str, n: int, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
        began = time.monotonic()
        training = [rows[asked.test_alphabets : asked.test_alphabets + n] for rows in order]
        weights = methods.meta_train(
            method, asked, network, images, training, generators("meta-training", n), generators("initial weights"), checkpoint
        )
        trained = time.monotonic() - began
        found = Curves(*(part.cpu() for part in learn(asked, network, weights, test)))
        console.print(
            f"{method}, {n} meta-training alphabet(s): error on held-out images "
            f"{100 * found.held_out_error[-1].mean():.1f} %; "
            f"meta-training {trained:.0f} s, test {time.monotonic() - began - trained:.0f} s",
            highlight=False,
        )
        return tuple(found)

    found = dict[tuple[str, int], Curves]()
    for n in asked.alphabets:
        for method in methods.METHODS:
            if method == "none" and n != asked.alphabets[0]:  # it learns nothing from them
                found[method, n] = found[method, asked.alphabets[0]]
            else:
                found[method, n] = Curves(*study.part(f"{method}-{n}", partial(curves, method, n)))
    return found


@torch.no_grad()
def learn(asked: Comparison, network: Conv4, params: Params, batch: TaskBatch) -> Curves:
    """Learn the test tasks, equally many of each seed, from meta-parameters (R, *shape): by SGD, whatever the method was.

    Batch norm takes the statistics of the images at hand: of a step's batch, of all held-out images of a task.
    """
    seen = list[tuple[Tensor, Tensor]]()
    held_out = list[tuple[Tensor, Tensor]]()

    def measure(weights: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = wide.logits(network, weights, x)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        return losses.mean(1), (logits.argmax(-1) != y).float().mean(1)

    @torch.no_grad()
    def watch(weights: Params) -> None:
        step = len(seen)
        if step % asked.measure_every == 0:
            held_out.append(measure(weights, batch.query_x, batch.query_y))
        seen.append(measure(weights, *inner.minibatch(batch.support_x, batch.support_y, asked.inner_batch, step)))

    count = len(next(iter(params.values())))
    with tree.replicas(count), torch.enable_grad():
        inner.sgd(
            Conv4Loss(network), tree.tile(params, len(batch.support_x)), batch.support_x, batch.support_y,
            lr=asked.inner_lr, steps=asked.inner_steps, batch=asked.inner_batch, watch=watch,
        )  # fmt: skip
    seen.pop()  # no batch follows the last step
    return Curves(
        *(torch.stack(part).unflatten(1, (count, -1)) for pairs in (seen, held_out) for part in zip(*pairs, strict=True))
    )


def area(values: Tensor, every: int, steps: int) -> Tensor:
    """Area under curves (points, ...), with a point for every `every` steps, divided by the number of steps: (...).

    With a point for each of T steps this is the authors' sum of trapezoids over T (utils.py): (T - 1) / T for a constant 1.
    """
    return torch.trapezoid(values, dx=every, dim=0) / steps
