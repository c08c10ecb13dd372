"""The outer loop, the same for every learner: sample, meta-gradient, optimiser step, validation. Read `train` first."""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import tree
from metalib.checkpoint import Checkpoint
from metalib.cuda_graph import Captured
from metalib.optimisers import Optimiser
from metalib.types import MetaGradient, MetaLearner, Params, TaskBatch, TaskLoss


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Outer:
    """The outer loop's own parameters."""

    optimiser: Literal["adam", "sgd", "muon"]  # muon: on convolution kernels, Adam on the rest
    # Reptile's and Leap's meta-gradients are distances: a rate above 2 overshoots the adapted weights by more than the way
    # there. Gradients of mean losses are of order 1, too. 10 is beyond all of them.
    lr: float = Field(gt=0, le=10)  # of Adam or SGD
    kernel_lr: float | None = Field(default=None, gt=0, le=1)  # of Muon, whose step is orthogonal, as large as kernels are
    kernel_decay: float | None = Field(default=None, ge=0, lt=1)  # Muon's weight decay
    schedule: Literal["constant", "linear", "cosine"]  # of every rate, from its value towards 0 after the last meta-step
    fixed_head: bool = False  # the head is adapted, but not meta-learned: with head_init zero, it starts a task at zero
    meta_steps: NonNegativeInt  # 0: nothing is learned, and the initial weights are validated once
    meta_batch: int = Field(ge=1, le=100_000)  # tasks in a meta-step
    validations: PositiveInt  # evenly spaced; one more, at the end, where they do not divide meta_steps

    @model_validator(mode="after")
    def _muon_has_its_own(self) -> "Outer":
        if (self.optimiser == "muon") != (self.kernel_lr is not None) or (self.kernel_lr is None) != (
            self.kernel_decay is None
        ):
            raise ValueError("kernel_lr and kernel_decay go with optimiser muon, which needs both")
        if self.optimiser != "sgd" and self.lr > 1:  # Adam moves every weight by about lr, whatever the gradient's size
            raise ValueError("lr of adam and muon must be at most 1: each meta-step moves a weight by about lr")
        return self

    @property
    def validate_every(self) -> int:
        """Meta-steps from one validation to the next; the last one is at the end, whether or not it is due."""
        return max(1, round(self.meta_steps / self.validations))


class Progress(NamedTuple):
    """Where a training stands after some meta-steps, with a number for each replica."""

    step: int  # meta-steps done
    query_loss: list[float]  # mean over the tasks since the last report, without skipped meta-steps
    validation: list[float] | None  # scores on the validation tasks, where validation was due; NaN of a replica that diverged
    skipped: list[int]  # meta-steps since the last report that were not taken, since a loss or a gradient was not finite
    diverged: list[int]  # the replicas that have ended: none of their last meta-steps was taken


class Result(NamedTuple):
    """What a training ends with: each replica's meta-parameters that did best on the validation tasks, and the history."""

    params: list[Params]
    best_step: list[int]
    validation: list[float]
    history: list[Progress]
    graph: str | None = None  # whether the meta-step was recorded as a CUDA graph (Captured.outcome); None without a GPU


class Diverged(ValueError):
    """A query loss or a meta-gradient is no longer finite; raised when all other replicas are trained to their end."""

    def __init__(self, message: str, replicas: list[int]):
        super().__init__(message)
        self.replicas = replicas  # that diverged


def meta_step(
    learner: MetaLearner,
    loss: TaskLoss,
    batch: TaskBatch,
    optimiser: Optimiser,
    progress: Tensor,
    factor: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """One meta-step of R replicas: changes the optimiser's params, returns each one's mean query loss, (R,).

    It never waits for the host (the tests run it on the `meta` device, where any look at a value raises). A replica whose query
    loss or gradient is not finite keeps its weights, and NaN is returned for it. `factor`, 0-dim, shortens the step:
    every optimiser here takes steps proportional to its rate, so this is the schedule, and it stays on the device.
    """
    grads, query_losses = meta_gradient(learner, loss, optimiser.params, batch, progress, chunk)
    query_loss = query_losses.view(_replicas(optimiser.params), -1).mean(1)
    flat = optimiser.flat(grads)
    largest = torch.maximum(flat.abs().amax(1), query_loss.abs())  # NaN where there is one
    finite = largest < torch.inf
    lost = ~finite
    optimiser.step(flat.masked_fill_(lost.unsqueeze(1), 0), finite * factor)
    return query_loss.masked_fill(lost, torch.nan)


def meta_gradient(
    learner: MetaLearner, loss: TaskLoss, params: Params, batch: TaskBatch, progress: Tensor, chunk: int | None = None
) -> MetaGradient:
    """The learner's meta-gradient for R replicas, params (R, *shape), with the query loss of each task of the batch, (T,).

    `chunk` tasks of each replica at a time, where all of them do not fit into memory: the mean over parts is the mean over all.
    """
    count = _replicas(params)
    each = len(batch.support_x) // count
    total, losses = dict[str, Tensor](), list[Tensor]()
    with tree.replicas(count):
        if chunk is None:
            return learner.meta_gradient(loss, params, batch, progress)
        for first in range(0, each, chunk):
            grads, query_loss = learner.meta_gradient(loss, params, _part(batch, count, first, chunk), progress)
            losses.append(query_loss.view(count, -1))
            grads = tree.scale(losses[-1].shape[1] / each, grads)
            total = tree.axpy(1.0, grads, total) if total else grads
    return MetaGradient(total, torch.cat(losses, 1).flatten())


def _part(batch: TaskBatch, count: int, first: int, size: int) -> TaskBatch:
    """Some tasks of each of `count` replicas."""

    def some(values: Tensor) -> Tensor:
        return values.unflatten(0, (count, -1))[:, first : first + size].flatten(0, 1)

    support_x, support_y, query_x, query_y = map(some, batch[:4])
    return TaskBatch(support_x, support_y, query_x, query_y, None if batch.classes is None else some(batch.classes))


def make_optimiser(params: Params, outer: Outer) -> Optimiser:
    """The outer optimiser, which holds the meta-parameters (R, *shape) from now on."""
    return Optimiser(
        params, outer.optimiser, lr=outer.lr, kernel_lr=outer.kernel_lr, kernel_decay=outer.kernel_decay,
        fixed_head=outer.fixed_head,
    )  # fmt: skip


def rate(schedule: str, progress: Tensor) -> Tensor:
    """The factor on every rate at this fraction of meta-training, both 0-dim."""
    if schedule == "constant":
        return torch.ones_like(progress)
    return 1 - progress if schedule == "linear" else (1 + torch.cos(torch.pi * progress)) / 2


class Best:
    """Each replica's meta-parameters with the best validation score so far; before there is one, the initial ones."""

    def __init__(self, params: Params):
        count = _replicas(params)
        self.params = {name: value.clone() for name, value in params.items()}  # (R, *shape)
        self.step = [0] * count
        self.score = [-math.inf] * count  # so that any real number is better

    def update(self, params: Params, step: int, scores: dict[int, float]) -> None:
        """Keep the params (R, *shape) of this step for the replicas whose score is at least as good as their best one.

        ValueError for a score that is not a number, which is neither better nor worse than any other.
        """
        for replica, score in scores.items():
            if math.isnan(score):
                raise ValueError(f"the validation score of replica {replica} is not a number at meta-step {step}")
            if score >= self.score[replica]:
                self.step[replica], self.score[replica] = step, score
                for name, value in params.items():
                    self.params[name][replica] = value[replica]


class State:
    """Everything that changes while R replicas are trained: what a checkpoint holds."""

    def __init__(self, params: Params, outer: Outer, generators: list[torch.Generator]):
        self.optimiser = make_optimiser(params, outer)
        self.params = self.optimiser.params  # (R, *shape), changed in place
        self.generators = generators
        self.best = Best(params)
        self.history = list[Progress]()
        self.taken = [0.0] * _replicas(params)  # each replica's last meta-step that was not skipped

    @property
    def step(self) -> int:
        """Meta-steps done when the last report was made."""
        return self.history[-1].step if self.history else 0

    @property
    def diverged(self) -> list[int]:
        """The replicas that have ended."""
        return self.history[-1].diverged if self.history else []

    def save(self, checkpoint: Checkpoint) -> None:
        checkpoint.save(
            step=self.step, best_step=self.best.step, best_score=self.best.score, best=self.best.params, params=self.params,
            optimiser=self.optimiser.state, generators=[g.get_state() for g in self.generators],
            history=[tuple(row) for row in self.history], taken=self.taken,
        )  # fmt: skip

    def load(self, checkpoint: Checkpoint) -> bool:
        """Go back to what the checkpoint holds; False when there is none."""
        saved = checkpoint.load(next(iter(self.params.values())).device)
        if saved is None:
            return False
        self.best.step, self.best.score, self.best.params = saved["best_step"], saved["best_score"], saved["best"]
        self.history = [Progress(*row) for row in saved["history"]]
        self.taken = saved["taken"]
        for name, value in self.params.items():
            value.copy_(saved["params"][name])
        self.optimiser.load(saved["optimiser"])
        for generator, kept in zip(self.generators, saved["generators"], strict=True):
            generator.set_state(kept.cpu())
        return True


def train(
    learner: MetaLearner,
    loss: TaskLoss,
    params: list[Params],
    sample: Callable[[list[torch.Generator], int], TaskBatch],
    score: Callable[[Params], float],
    outer: Outer,
    *,
    generators: list[torch.Generator],
    checkpoint: Checkpoint | None = None,
    chunk: int | None = None,
    report_every: int = 50,
) -> Iterator[Progress | Result]:
    """Meta-train R replicas at once, each from its own initial weights; yields Progress now and then, and at the end a Result.

    A replica ends where it would have ended alone, to rounding. Together they fill a GPU that one cannot fill.

    Args:
        loss: what the learner minimises.
        params: each replica's initial weights of the network, (*shape), on the device to train on.
        sample: (generators, n) -> a batch of n tasks drawn from each generator, the first replica's tasks first.
        score: meta-parameters of one replica -> how well they do on validation tasks, any real number, higher is better;
            those with the best score are the result.
        generators: one for each replica's tasks; with the initial weights it determines the result.
        checkpoint: a file that is written at every validation, and taken up if it is there. A training that is killed and taken
            up ends as it would have, on the CPU to the bit. checkpoint.keep removes the file when it is no longer needed.
        chunk: how many of each replica's tasks to compute at a time, where a whole meta-batch does not fit into memory.
        report_every: meta-steps between reports; every validation is reported, too.
    Raises: Diverged. A replica skips a meta-step whose query loss or meta-gradient is not finite, be it of one task alone; when
        none of its last `report_every` was taken, it has diverged. The others are trained to their end, as if it had not.
    """
    starts = [learner.init(p) for p in params]
    initial = {name: torch.stack([start[name].detach() for start in starts]) for name in starts[0]}
    state = State(initial, outer, generators)
    values = state.params
    if checkpoint and state.load(checkpoint):
        checkpoint.say(f"goes on from meta-step {state.step}")
        yield state.history[-1]
    device = next(iter(values.values())).device
    steps_done = torch.full((), float(state.step), device=device)
    losses = torch.zeros(len(starts), device=device)  # summed over the meta-steps since the last report
    skipped = torch.zeros_like(losses)  # how many of them were not finite
    taken = losses.new_tensor(state.taken)  # the last one that was

    def step() -> None:
        progress = steps_done / outer.meta_steps
        batch = sample(generators, outer.meta_batch)
        factor = rate(outer.schedule, progress)
        query_loss = meta_step(learner, loss, batch, state.optimiser, progress, factor, chunk)
        steps_done.add_(1)
        finite = query_loss.isfinite()
        losses.add_(torch.where(finite, query_loss, 0))
        skipped.add_(~finite)
        taken.copy_(torch.where(finite, steps_done, taken))

    def report(done: int, validate: bool) -> Progress:
        means = losses / (done - state.step - skipped)
        query_loss, left_out, last = torch.stack([means, skipped, taken]).tolist()
        losses.zero_()
        skipped.zero_()
        diverged = list[int]()
        for r in range(len(starts)):
            if r not in state.diverged:
                state.taken[r] = last[r]
            if r in state.diverged or (done and last[r] <= max(0, done - report_every)):
                diverged.append(r)
        scores = {r: score(_replica(values, r)) for r in range(len(starts)) if validate and r not in diverged}
        state.best.update(values, done, scores)
        validation = [scores.get(r, math.nan) for r in range(len(starts))] if validate else None
        state.history.append(Progress(done, query_loss, validation, [int(n) for n in left_out], diverged))
        if len(diverged) == len(starts):
            refuse_divergence(state)
        return state.history[-1]

    if outer.meta_steps == 0:  # nothing is learned: the initial weights are the result
        yield report(0, validate=True)
    graph = Captured(step, generators) if device.type == "cuda" else None
    call = graph or step
    for done in range(state.step + 1, outer.meta_steps + 1):
        call()
        validate = done % outer.validate_every == 0 or done == outer.meta_steps
        if validate or done % report_every == 0:
            now = report(done, validate)
            if validate and checkpoint:
                state.save(checkpoint)
            yield now
    refuse_divergence(state)
    best = [_replica(state.best.params, r) for r in range(len(starts))]
    yield Result(best, state.best.step, state.best.score, state.history, graph.outcome if graph else None)


def refuse_divergence(state: State) -> None:
    """Diverged, which names the last good meta-step of each replica that has ended early."""
    if state.diverged:
        steps = " and ".join(f"{state.taken[replica]:.0f}" for replica in state.diverged)
        raise Diverged(f"the query loss or the meta-gradient stopped being finite after meta-step {steps}", state.diverged)


def _replicas(values: Params) -> int:
    return len(next(iter(values.values())))


def _replica(values: Params, r: int) -> Params:
    return {name: value[r] for name, value in values.items()}
