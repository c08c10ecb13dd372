"""The outer loop, the same for every learner: sample, meta-gradient, optimiser step, validation. Read `train` first."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import tree
from metalib.checkpoint import Checkpoint
from metalib.cuda_graph import captured
from metalib.types import MetaGradient, MetaLearner, Params, TaskBatch, TaskLoss


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Outer:
    """The outer loop's own parameters."""

    optimiser: Literal["adam", "sgd", "muon"]  # muon: torch.optim.Muon on convolution kernels, Adam on the rest
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
    query_loss: list[float]  # mean over the tasks since the last report
    validation: list[float] | None  # scores on the validation tasks, where validation was due


class Result(NamedTuple):
    """What a training ends with: each replica's meta-parameters that did best on the validation tasks, and the history."""

    params: list[Params]
    best_step: list[int]
    validation: list[float]
    history: list[Progress]


class Diverged(ValueError):
    """A query loss is no longer finite; the weights are those of the last good meta-step.

    When one replica diverges, all that are trained with it stop.
    """

    def __init__(self, message: str, replicas: list[int]):
        super().__init__(message)
        self.replicas = replicas  # that diverged


def meta_step(
    learner: MetaLearner,
    loss: TaskLoss,
    batch: TaskBatch,
    params: Params,
    optimisers: list[torch.optim.Optimizer],
    progress: Tensor,
    factor: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """One meta-step of R replicas: changes `params` (R, *shape) in place, returns each one's mean query loss, (R,).

    It never waits for the host (the tests run it on the `meta` device, where any look at a value raises). A replica whose query
    loss or gradient is not finite keeps its weights, and NaN is returned for it. `factor`, 0-dim, shortens the step:
    every optimiser here takes steps proportional to its rate, so this is the schedule, and it stays on the device.
    """
    grads, query_losses = meta_gradient(learner, loss, params, batch, progress, chunk)
    query_loss = query_losses.view(_replicas(params), -1).mean(1)
    finite = query_loss.isfinite()
    for value in grads.values():
        finite = finite & value.reshape(len(value), -1).isfinite().all(1)
    safe = {name: torch.where(tree.per_task(finite, value), value, 0) for name, value in grads.items()}
    before = {name: value.clone() for name, value in params.items()}
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            for leaf, grad in zip(group["params"], _views(safe, group["names"], group["matrices"]), strict=True):
                leaf.grad = grad
        optimiser.step()
    length = torch.where(finite, factor, 0)
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(torch.lerp(before[name], value, tree.per_task(length, value).to(value.dtype)))
    return torch.where(finite, query_loss, torch.nan)


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
        for first in range(0, each, chunk or each):
            part = batch if chunk is None else _part(batch, count, first, chunk)
            grads, query_loss = learner.meta_gradient(loss, params, part, progress)
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


def make_optimisers(params: Params, outer: Outer) -> list[torch.optim.Optimizer]:
    """The outer optimisers over (views of) the meta-parameters (R, *shape), which they change in place.

    Muon leaves the first layer's kernels to Adam: with one input channel they are hardly matrices, and an orthogonal
    step would be several times longer for them than for the others. A fixed head is given to no optimiser (Kao, Chiu, Chen
    2022, https://arxiv.org/abs/2106.15367, "zeroing trick": labels are random, so all it could learn is noise).
    """
    device = next(iter(params.values())).device
    kernels = [name for name, value in tree.part(params, "conv").items() if outer.optimiser == "muon" and value.shape[-1] > 1]
    learned = tree.without(params, "head.") if outer.fixed_head else params
    others = [name for name in learned if name not in kernels]
    if outer.optimiser == "sgd":
        return [torch.optim.SGD([_group(params, others)], lr=outer.lr)]
    # capturable: Adam's step counter lives on the device; torch refuses it where there are no graphs to capture
    adam = torch.optim.Adam([_group(params, others)], lr=outer.lr, capturable=device.type not in ("cpu", "mps"))
    if not kernels:
        return [adam]
    assert outer.kernel_lr is not None and outer.kernel_decay is not None
    group = _group(params, kernels, matrices=True)
    return [torch.optim.Muon([group], lr=outer.kernel_lr, weight_decay=outer.kernel_decay), adam]


def _group(params: Params, names: list[str], matrices: bool = False) -> dict[str, Any]:
    return {"params": _views(params, names, matrices), "names": names, "matrices": matrices}


def _views(values: Params, names: list[str], matrices: bool) -> list[Tensor]:
    """What an optimiser sees: values as they are, or each replica's kernels as (filters, 9 * channels in), which Muon wants."""
    return [part for name in names for part in (values[name].flatten(2).unbind() if matrices else [values[name]])]


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

    def update(self, params: Params, step: int, scores: list[float]) -> None:
        """Keep the params (R, *shape) of this step for the replicas whose score is at least as good as their best one.

        ValueError for a score that is not a number, which is neither better nor worse than any other.
        """
        for replica, score in enumerate(scores):
            if math.isnan(score):
                raise ValueError(f"the validation score of replica {replica} is not a number at meta-step {step}")
            if score >= self.score[replica]:
                self.step[replica], self.score[replica] = step, score
                for name, value in params.items():
                    self.params[name][replica] = value[replica]


class State:
    """Everything that changes while R replicas are trained: what a checkpoint holds."""

    def __init__(self, params: Params, outer: Outer, generators: list[torch.Generator]):
        self.params = params  # (R, *shape), changed in place
        self.optimisers = make_optimisers(params, outer)
        self.generators = generators
        self.best = Best(params)
        self.history = list[Progress]()

    @property
    def step(self) -> int:
        """Meta-steps done when the last report was made."""
        return self.history[-1].step if self.history else 0

    def save(self, checkpoint: Checkpoint) -> None:
        checkpoint.save(
            step=self.step, best_step=self.best.step, best_score=self.best.score, best=self.best.params, params=self.params,
            optimisers=[o.state_dict() for o in self.optimisers], generators=[g.get_state() for g in self.generators],
            history=[tuple(row) for row in self.history],
        )  # fmt: skip

    def load(self, checkpoint: Checkpoint) -> bool:
        """Go back to what the checkpoint holds; False when there is none."""
        saved = checkpoint.load(next(iter(self.params.values())).device)
        if saved is None:
            return False
        self.best.step, self.best.score, self.best.params = saved["best_step"], saved["best_score"], saved["best"]
        self.history = [Progress(*row) for row in saved["history"]]
        for name, value in self.params.items():
            value.copy_(saved["params"][name])
        for optimiser, kept in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
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
    checkpoint: Path | None = None,
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
        checkpoint: a file that is written at every validation, taken up if it is there, and removed at the end. A training
            that is killed and taken up ends as it would have, on the CPU to the bit.
        chunk: how many of each replica's tasks to compute at a time, where a whole meta-batch does not fit into memory.
        report_every: meta-steps between reports; every validation is reported, too.
    Raises: Diverged when a query loss or meta-gradient is no longer finite.
    """
    starts = [learner.init(p) for p in params]
    values = {name: torch.stack([start[name].detach() for start in starts]) for name in starts[0]}
    state, kept = State(values, outer, generators), Checkpoint(checkpoint)
    if state.load(kept):
        yield state.history[-1]
    device = next(iter(values.values())).device
    steps_done = torch.full((), float(state.step), device=device)
    losses = torch.zeros(len(starts), device=device)  # summed over the meta-steps since the last report

    def step() -> None:
        progress = steps_done / outer.meta_steps
        batch = sample(generators, outer.meta_batch)
        factor = rate(outer.schedule, progress)
        losses.add_(meta_step(learner, loss, batch, values, state.optimisers, progress, factor, chunk))
        steps_done.add_(1)

    def report(done: int, query_loss: list[float], validate: bool) -> Progress:
        scores = [score(_replica(values, r)) for r in range(len(starts))] if validate else None
        state.history.append(Progress(done, query_loss, scores))
        if scores is not None:
            state.best.update(values, done, scores)
        return state.history[-1]

    if outer.meta_steps == 0:  # nothing is learned: the initial weights are the result
        yield report(0, [math.nan] * len(starts), validate=True)
    if device.type == "cuda":
        step = captured(step, generators)
    for done in range(state.step + 1, outer.meta_steps + 1):
        step()
        validate = done % outer.validate_every == 0 or done == outer.meta_steps
        if validate or done % report_every == 0:
            query_loss = (losses / (done - state.step)).tolist()
            refuse_divergence(query_loss, state.step, done)
            losses.zero_()
            now = report(done, query_loss, validate)
            if validate:
                state.save(kept)
            yield now
    kept.remove()
    yield Result([_replica(state.best.params, r) for r in range(len(starts))], state.best.step, state.best.score, state.history)


def refuse_divergence(query_loss: list[float], since: int, done: int) -> None:
    """Diverged when a replica's mean query loss is NaN, which meta_step returns where something was not finite."""
    lost = [replica for replica, value in enumerate(query_loss) if math.isnan(value)]
    if lost:
        raise Diverged(f"the query loss or the meta-gradient stopped being finite between meta-steps {since} and {done}", lost)


def _replicas(values: Params) -> int:
    return len(next(iter(values.values())))


def _replica(values: Params, r: int) -> Params:
    return {name: value[r] for name, value in values.items()}
