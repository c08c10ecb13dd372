"""Learning along combinations of the inner loop's gradients (Nichol, Achiam, Schulman 2018, section 6.2, figure 3).

An inner loop of k steps of SGD, each on new images, yields the gradients g_1, ..., g_k. Their sum is Reptile's update, the
last one FOMAML's, and g_1 alone is joint training; the outer step may go along any combination of them.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from metalib import algorithms, evaluation, inner, training, tree
from metalib.checkpoint import Checkpoint
from metalib.data import tasks
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from metalib.randomness import generator
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch
from stages.command import console
from studies.computing import Study
from studies.update_contents import schema

COMBINATIONS = {
    "g1": [1.0],
    "g1 + g2": [1.0, 1.0],
    "(g1 + g2)/2": [1 / 2, 1 / 2],
    "g2": [0.0, 1.0],
    "g1 + g2 + g3": [1.0, 1.0, 1.0],
    "(g1 + g2 + g3)/3": [1 / 3, 1 / 3, 1 / 3],
    "g3": [0.0, 0.0, 1.0],
    "g1 + ... + g4": [1.0, 1.0, 1.0, 1.0],
    "(g1 + ... + g4)/4": [1 / 4, 1 / 4, 1 / 4, 1 / 4],
    "g4": [0.0, 0.0, 0.0, 1.0],
}
"""The ten combinations that the authors compare: name -> the weight of each gradient."""


@dataclass(frozen=True)
class Combination:
    """A MetaLearner for R replicas; each steps along its own combination of k gradients."""

    weights: Tensor  # (R, k)
    inner_lr: float
    inner_batch: int  # images of an inner step

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        return inner.sgd(
            loss, tree.tile(params, len(x)), x, y,
            lr=self.inner_lr, steps=self.weights.shape[1], batch=self.inner_batch, watch=watch,
        )  # fmt: skip

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        """The mean of the combination over each replica's tasks. The query loss is the last mini-batch's, before its step."""
        x, y = tasks.support_x, tasks.support_y
        weights = self.weights.repeat_interleave(len(x) // len(self.weights), 0)  # (T, k)
        phi = tree.detach(tree.tile(params, len(x)))
        total = tree.map_with(torch.zeros_like, phi)
        for step in range(weights.shape[1]):
            value = loss(phi, *inner.minibatch(x, y, self.inner_batch, step))
            grads = tree.grad(value.sum(), phi)
            total = tree.axpy(weights[:, step], grads, total)
            phi = tree.detach(tree.axpy(-self.inner_lr, grads, phi))
        return MetaGradient(tree.mean_tasks(tree.detach(total)), value.detach())


class Measured(NamedTuple):
    combination: str
    step: int  # meta-steps done
    accuracy: float  # on the validation tasks, with the support set's statistics, in [0, 1]


def learning_curves(
    values: schema.Combinations,
    seed: int,
    network: Conv4,
    characters: Tensor,
    pool: Tensor,
    validation: tasks.Tasks,
    shot: int,
    study: Study,
) -> list[Measured]:
    """Train each combination from the same weights on the same tasks, and test it every so often.

    Combinations of as many gradients are replicas of one training, a part of the study. A task for k gradients holds that for
    k - 1, and more images.

    Args:
        characters: (N, drawers, H, W) uint8.   pool: (n,) those to train on, each in four rotations.
        validation: tasks to test on, with `shot` support images of each class.
    Raises: training.Diverged when a loss stops being finite.
    """
    params = network.init(generator(seed, "initial weights", device=pool.device))
    tester = algorithms.build("fomaml", {"inner_lr": values.inner_lr, "inner_steps": values.test_steps, "inner_batch": None})
    outer = training.Outer(
        optimiser="sgd", lr=values.meta_step * values.inner_lr, schedule="linear",
        meta_steps=values.meta_steps, meta_batch=values.meta_batch, validations=values.validations,
    )  # fmt: skip

    def score(weights: Params) -> float:
        accuracy = evaluation.evaluate(tester, network, weights, characters, validation, shot, every_step=False)
        return float(accuracy.inductive[-1].mean())

    def curves(k: int, checkpoint: Checkpoint) -> list[tuple[str, int, float]]:
        names = [name for name, weights in COMBINATIONS.items() if len(weights) == k]

        def sample(randoms: list[torch.Generator], count: int) -> TaskBatch:
            drawn = tasks.draw(
                count, pool, way=network.way, images=k * values.shot, drawers=characters.shape[1],
                rotations="classes", generators=randoms,
            )  # fmt: skip
            batch = tasks.gather(characters, drawn, k * values.shot)
            return TaskBatch(*(part.repeat(len(names), *[1] * (part.ndim - 1)) for part in batch[:4]))

        weights = torch.tensor([COMBINATIONS[name] for name in names], device=pool.device)
        learner = Combination(weights, values.inner_lr, network.way * values.shot)
        starts = [params] * len(names)
        random = generator(seed, "update_contents", "tasks", device=pool.device)
        for now in training.train(
            learner, Conv4Loss(network), starts, sample, score, outer, generators=[random], checkpoint=checkpoint
        ):
            if isinstance(now, training.Result):
                return [
                    (name, row.step, accuracy)
                    for row in now.history
                    if row.validation is not None
                    for name, accuracy in zip(names, row.validation, strict=True)
                ]
            if now.validation is not None:
                for name, accuracy in zip(names, now.validation, strict=True):
                    console.print(f"{name}: meta-step {now.step}, {100 * accuracy:.2f} %", highlight=False)
        raise AssertionError("a training ends with its result")

    counts = sorted({len(weights) for weights in COMBINATIONS.values()})
    return [Measured(*point) for k in counts for point in study.part(f"{k}-gradients", partial(curves, k))]
