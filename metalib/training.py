"""The outer loop, the same for every learner: sample, meta-gradient, optimiser step; validation and checkpoints."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import tree
from metalib.types import MetaGradient, MetaLearner, Params, TaskBatch, TaskLoss


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Outer:
    """The outer loop's own parameters."""

    optimiser: Literal["adam", "sgd", "muon"]  # muon: torch.optim.Muon on convolution kernels, Adam on the rest
    lr: PositiveFloat  # of Adam or SGD
    kernel_lr: PositiveFloat | None = None  # of Muon
    kernel_decay: float | None = Field(default=None, ge=0, lt=1)  # Muon's weight decay
    schedule: Literal["constant", "linear", "cosine"]  # of every rate, from its value towards 0 after the last meta-step
    fixed_head: bool = False  # the head is adapted, but not meta-learned: with head_init zero, it starts a task at zero
    meta_steps: PositiveInt
    meta_batch: PositiveInt  # tasks in a meta-step
    validate_every: PositiveInt  # meta-steps between validations

    @model_validator(mode="after")
    def _muon_has_its_own(self) -> "Outer":
        if (self.optimiser == "muon") != (self.kernel_lr is not None) or (self.kernel_lr is None) != (
            self.kernel_decay is None
        ):
            raise ValueError("kernel_lr and kernel_decay go with optimiser muon, which needs both")
        return self


class Progress(NamedTuple):
    """What is known after some meta-steps, a number for each replica."""

    step: int  # meta-steps done
    query_loss: list[float]  # mean over the tasks since the last report
    validation: list[float] | None  # accuracy in [0, 1], where validation was due


class Result(NamedTuple):
    """The end of a training: for each replica the meta-parameters that did best on the validation tasks; how it went."""

    params: list[Params]
    best_step: list[int]
    validation: list[float]
    history: list[Progress]


class Diverged(ValueError):
    """A query loss is no longer finite; the weights are those of the last good meta-step.

    One replica's end is the end of all that are trained with it.
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
    loss or gradient is not finite keeps its weights, and NaN is returned for it. `factor`, 0-dim, shortens the step: those of
    all our optimisers are proportional to their rates, so this is the schedule, and it stays on the device.
    """
    grads, query_loss = meta_gradient(learner, loss, params, batch, progress, chunk)
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
    """The learner's meta-gradient for R replicas, params (R, *shape), and their mean query losses, (R,).

    `chunk` tasks of each replica at a time, where all of them do not fit into memory: the mean over parts is the mean over all.
    """
    count = len(next(iter(params.values())))
    each = len(batch.support_x) // count
    total, losses = dict[str, Tensor](), list[Tensor]()
    with tree.replicas(count):
        for first in range(0, each, chunk or each):
            part = batch if chunk is None else _part(batch, count, first, chunk)
            grads, query_loss = learner.meta_gradient(loss, params, part, progress)
            losses.append(query_loss.view(count, -1))
            grads = tree.scale(losses[-1].shape[1] / each, grads)
            total = tree.axpy(1.0, grads, total) if total else grads
    return MetaGradient(total, torch.cat(losses, 1).mean(1))


def _part(batch: TaskBatch, count: int, first: int, size: int) -> TaskBatch:
    """Some tasks of each of `count` replicas."""

    def some(values: Tensor) -> Tensor:
        return values.unflatten(0, (count, -1))[:, first : first + size].flatten(0, 1)

    support_x, support_y, query_x, query_y = map(some, batch[:4])
    return TaskBatch(support_x, support_y, query_x, query_y, None if batch.classes is None else some(batch.classes))


def make_optimisers(params: Params, outer: Outer) -> list[torch.optim.Optimizer]:
    """The outer optimisers over (views of) the meta-parameters (R, *shape), which they change in place.

    Muon leaves the first layer's kernels to Adam: with one channel in, they are no matrix worth the name, and an orthogonal
    step would be several times longer for them than for the others. A head that is fixed is left to none (Kao, Chiu, Chen
    2022, https://arxiv.org/abs/2106.15367, "zeroing trick": labels are random, so what it could learn is noise).
    """
    device = next(iter(params.values())).device
    kernels = [
        name for name, value in params.items() if outer.optimiser == "muon" and name.startswith("conv") and value.shape[-1] > 1
    ]
    others = [name for name in params if name not in kernels and not (outer.fixed_head and name.startswith("head."))]
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
    """What a rate is multiplied by after this part of meta-training, both 0-dim."""
    if schedule == "constant":
        return torch.ones_like(progress)
    return 1 - progress if schedule == "linear" else (1 + torch.cos(torch.pi * progress)) / 2


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
    """Meta-train R replicas at once, each from its own initial weights; yields Progress now and then, and a Result at the end.

    A replica ends where it would have ended alone, to rounding. Together they fill a GPU that one cannot fill.

    Args:
        loss: what the learner minimises.
        params: each replica's initial weights of the network, (*shape), on the device to train on.
        sample: (generators, tasks) -> a batch of so many tasks drawn from each generator, one replica's after the other's.
        score: meta-parameters of one replica -> accuracy on the validation tasks; the best validated ones are kept.
        generators: of each replica's tasks; with the initial weights it determines the result.
        checkpoint: a file that is written at every validation, taken up if it is there, and removed at the end. A training
            that is killed and taken up ends as it would have, to the bit on the CPU.
        chunk: tasks of a meta-batch at a time, where all of them do not fit into memory.
    Raises: Diverged when a query loss or meta-gradient stops being finite.
    """
    starts = [learner.init(p) for p in params]
    values = {name: torch.stack([start[name].detach() for start in starts]) for name in starts[0]}
    device, count = next(iter(values.values())).device, len(starts)
    optimisers = make_optimisers(values, outer)
    start, history = 0, list[Progress]()
    best, best_step, best_score = {name: value.clone() for name, value in values.items()}, [0] * count, [-1.0] * count

    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        start, best_step, best_score = state["step"], state["best_step"], state["best_score"]
        history = [Progress(*row) for row in state["history"]]
        best = state["best"]
        for name, value in values.items():
            value.copy_(state["params"][name])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for generator, kept in zip(generators, state["generators"], strict=True):
            generator.set_state(kept.cpu())
        yield history[-1]

    steps_done = torch.full((), float(start), device=device)
    losses = torch.zeros(count, device=device)

    def step() -> None:
        progress = steps_done / outer.meta_steps
        batch = sample(generators, outer.meta_batch)
        losses.add_(meta_step(learner, loss, batch, values, optimisers, progress, rate(outer.schedule, progress), chunk))
        steps_done.add_(1)

    if device.type == "cuda":
        step = captured(step, generators)
    since = start
    for done in range(start + 1, outer.meta_steps + 1):
        step()
        validate = done % outer.validate_every == 0 or done == outer.meta_steps
        if not validate and done % report_every:
            continue
        query_loss = (losses / (done - since)).tolist()
        lost = [replica for replica, value in enumerate(query_loss) if value != value]
        if lost:
            raise Diverged(
                f"the query loss or the meta-gradient stopped being finite between meta-steps {since} and {done}", lost
            )
        accuracies = [score(_replica(values, r)) for r in range(count)] if validate else None
        history.append(Progress(done, query_loss, accuracies))
        for r, accuracy in enumerate(accuracies or []):
            if accuracy >= best_score[r]:
                best_step[r], best_score[r] = done, accuracy
                for name, value in values.items():
                    best[name][r] = value[r]
        losses.zero_()
        since = done
        if validate and checkpoint is not None:
            _save(
                checkpoint,
                step=done, best_step=best_step, best_score=best_score, best=best, params=values,
                optimisers=[o.state_dict() for o in optimisers], generators=[g.get_state() for g in generators],
                history=[tuple(row) for row in history],
            )  # fmt: skip
        yield history[-1]
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    yield Result([_replica(best, r) for r in range(count)], best_step, best_score, history)


def _replica(values: Params, r: int) -> Params:
    return {name: value[r] for name, value in values.items()}


def captured(step: Callable[[], None], generators: list[torch.Generator], plain_calls: int = 3) -> Callable[[], None]:
    """`step` as a CUDA graph: recorded once, then launched as a whole, because its kernels are shorter than their launches.

    The first calls are plain ones, on a stream of their own, as recording wants it (pytorch.org/docs, "CUDA semantics"); they
    make the optimisers' state and choose the convolutions' algorithms. Where a step cannot be recorded, a warning says why, and
    plain calls go on.
    """
    stream, calls = torch.cuda.Stream(), 0
    replay: Callable[[], None] | None = None

    def plain() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # Adam's, of steps outside of a graph
            step()
        torch.cuda.current_stream().wait_stream(stream)

    def call() -> None:
        nonlocal calls, replay
        calls += 1
        if calls <= plain_calls:
            return plain()
        if replay is None:
            replay = _record(step, generators, stream) or plain
        replay()

    return call


def _record(
    step: Callable[[], None], generators: list[torch.Generator], stream: torch.cuda.Stream
) -> Callable[[], None] | None:
    graph = torch.cuda.CUDAGraph()
    states = [generator.get_state() for generator in generators]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            if hasattr(graph, "register_generator_state"):  # newer versions of PyTorch register generators themselves
                for generator in generators:
                    graph.register_generator_state(generator)  # each launch draws on from where the last one left
        # the outer context makes the present stream current again, whatever a failing capture leaves
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
            step()  # is recorded, not run
    except RuntimeError as error:
        torch.cuda.synchronize()
        graph.reset()
        for generator, state in zip(generators, states, strict=True):
            fresh = torch.Generator(generator.device)  # a failed capture may leave the old state marked as of a graph
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh)
        # leaving torch.cuda.graph after an error raises another one, which knows nothing but that there was one
        reason = str(error.__context__ or error).partition("\n")[0]
        warnings.warn(f"no CUDA graph of the meta-step, which runs kernel by kernel: {reason}", stacklevel=2)
        return None
    return graph.replay


def _save(checkpoint: Path, **state: Any) -> None:
    """Whole or not at all."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    beside = checkpoint.with_suffix(".part")
    torch.save(state, beside)
    os.replace(beside, checkpoint)
