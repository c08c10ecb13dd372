"""Few-shot accuracy: task by task, after every number of inner steps, under both protocols."""

from typing import NamedTuple

import torch
from torch import Tensor

from metalib.data.tasks import Tasks, gather
from metalib.models import wide
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from metalib.types import MetaLearner, Params, TaskBatch


class Accuracy(NamedTuple):
    """Accuracy of each task after 0, 1, ..., n inner steps, (n + 1, tasks), in [0, 1].

    transductive: batch norm over the whole query set, as the numbers of the slides' table are.
    inductive: batch norm with the support set's statistics, so that a prediction does not depend on the other queries.
    """

    transductive: Tensor
    inductive: Tensor


def evaluate(
    learner: MetaLearner,
    network: Conv4,
    params: Params,
    characters: Tensor,
    tasks: Tasks,
    shot: int,
    chunk: int | None = None,
    every_step: bool = True,
) -> Accuracy:
    """Adapt to every task and classify its queries.

    `chunk` tasks, or a few less, are adapted at a time, which does not change the result. Left out, it is 16; on a GPU, which
    a few tasks do not fill, it is as many tasks as have 4,096 images, but at least 16.
    Without `every_step` the accuracies are only those after the last inner step, (1, tasks).
    """
    if chunk is None:
        chunk = max(16, 4096 // tasks.images[0].numel()) if characters.is_cuda else 16
    parts = -(-len(tasks.classes) // chunk)  # as equal as can be, since a GPU prepares itself for every new shape
    found = [
        evaluate_batch(learner, network, params, gather(characters, Tasks(*some), shot), every_step)
        for some in zip(*(index.chunk(parts) for index in tasks), strict=True)
    ]
    return Accuracy(*(torch.cat(part, 1) for part in zip(*found, strict=True)))


def evaluate_batch(learner: MetaLearner, network: Conv4, params: Params, batch: TaskBatch, every_step: bool = True) -> Accuracy:
    """`evaluate` on one batch of tasks that is already gathered."""
    support = batch.support_x.shape[1]
    together = torch.cat([batch.support_x, batch.query_x], 1)
    transductive, inductive = list[Tensor](), list[Tensor]()

    @torch.no_grad()
    def watch(weights: Params) -> None:
        for scores, logits in (
            (transductive, wide.logits(network, weights, batch.query_x)),
            (inductive, wide.logits(network, weights, together, support)[:, support:]),
        ):
            scores.append((logits.argmax(-1) == batch.query_y).float().mean(1))

    # Adaptation sees the support set alone, normalised by its own statistics: the same under both protocols.
    adapted = learner.adapt(Conv4Loss(network), params, batch.support_x, batch.support_y, watch if every_step else None)
    if not every_step:
        watch(adapted)
    return Accuracy(torch.stack(transductive), torch.stack(inductive))
