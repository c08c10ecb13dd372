"""The outer loop, the same for every learner: sample, meta-gradient, optimiser step; validation and checkpoints."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib.types import MetaLearner, Params, TaskBatch, TaskLoss


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Outer:
    """The outer loop's own parameters."""

    optimiser: Literal["adam", "sgd", "muon"]  # muon: torch.optim.Muon on convolution kernels, Adam on the rest
    lr: PositiveFloat  # of Adam or SGD
    kernel_lr: PositiveFloat | None = None  # of Muon
    kernel_decay: float | None = Field(default=None, ge=0, lt=1)  # Muon's weight decay
    schedule: Literal["constant", "linear", "cosine"]  # of every rate, from its value to 0 at the last meta-step
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
    """What is known after some meta-steps."""

    step: int  # meta-steps done
    query_loss: float  # mean over the tasks since the last report
    validation: float | None  # accuracy in [0, 1], where validation was due


class Result(NamedTuple):
    """The end of a training: the meta-parameters that did best on the validation tasks, and how it went."""

    params: Params
    best_step: int
    validation: float
    history: list[Progress]


class Diverged(ValueError):
    """The query loss is no longer finite; the weights are those of the last good meta-step."""


def meta_step(
    learner: MetaLearner,
    loss: TaskLoss,
    sample: Callable[[], TaskBatch],
    params: Params,
    optimisers: list[torch.optim.Optimizer],
    progress: Tensor,
) -> Tensor:
    """One meta-step: changes `params` in place and returns the mean query loss, 0-dim.

    It never waits for the host (the tests run it on the `meta` device, where any look at a value raises). A query loss that
    is not finite leaves the weights alone.
    """
    grads, query_loss = learner.meta_gradient(loss, params, sample(), progress)
    mean = query_loss.mean()
    finite = mean.isfinite()
    for value in grads.values():
        finite = finite & value.isfinite().all()
    before = {name: value.clone() for name, value in params.items()}
    for leaf, name in ((leaf, name) for o in optimisers for g in o.param_groups for leaf, name in _leaves(g)):
        leaf.grad = torch.where(finite, grads[name], 0).view(leaf.shape)
    for optimiser in optimisers:
        optimiser.step()
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(torch.where(finite, value, before[name]))
    return torch.where(finite, mean, torch.nan)


def make_optimisers(params: Params, outer: Outer) -> list[torch.optim.Optimizer]:
    """The outer optimisers over (views of) the meta-parameters, which they change in place.

    Muon leaves the first layer's kernels to Adam: with one channel in, they are no matrix worth the name, and an orthogonal
    step would be several times longer for them than for the others.
    """
    device = next(iter(params.values())).device
    kernels = [
        name for name, value in params.items() if outer.optimiser == "muon" and name.startswith("conv") and value.shape[-1] > 1
    ]
    others = [name for name in params if name not in kernels]
    if outer.optimiser == "sgd":
        return [torch.optim.SGD([_group(params, others)], lr=outer.lr)]
    # capturable: Adam's step counter lives on the device; torch refuses it on the CPU, where it means nothing
    adam = torch.optim.Adam([_group(params, others)], lr=outer.lr, capturable=device.type != "cpu")
    if not kernels:
        return [adam]
    assert outer.kernel_lr is not None and outer.kernel_decay is not None
    muon = torch.optim.Muon([_group(params, kernels)], lr=outer.kernel_lr, weight_decay=outer.kernel_decay)
    return [muon, adam]


def _group(params: Params, names: list[str]) -> dict[str, Any]:
    """A parameter group of views: kernels as (filters, 9 * channels in) matrices, which Muon wants, others as they are."""
    return {"params": [p.flatten(1) if p.ndim == 4 else p for p in (params[n] for n in names)], "names": names}


def _leaves(group: dict[str, Any]) -> Iterator[tuple[Tensor, str]]:
    return zip(group["params"], group["names"], strict=True)


def rate(schedule: str, step: int, steps: int) -> float:
    """What a rate is multiplied by at meta-step `step` of `steps`, counted from 0."""
    done = torch.tensor(step / steps, dtype=torch.float64)
    factors = {"constant": done * 0 + 1, "linear": 1 - done, "cosine": (1 + torch.cos(torch.pi * done)) / 2}
    return float(factors[schedule])


def train(
    learner: MetaLearner,
    loss: TaskLoss,
    params: Params,
    sample: Callable[[torch.Generator, int], TaskBatch],
    score: Callable[[Params], float],
    outer: Outer,
    *,
    generator: torch.Generator,
    checkpoint: Path | None = None,
    report_every: int = 50,
) -> Iterator[Progress | Result]:
    """Meta-train from the network's initial weights; yields Progress now and then, and a Result at the end.

    Args:
        loss: what the learner minimises.
        params: the network's initial weights, (*shape), on the device to train on.
        sample: (generator, tasks) -> a batch of that many tasks.
        score: meta-parameters -> accuracy on the validation tasks; the best of the validated meta-parameters is kept.
        generator: of the sampled tasks; with the initial weights it determines the result.
        checkpoint: a file that is written at every validation, taken up if it is there, and removed at the end. A training
            that is killed and taken up ends as it would have, to the bit on the CPU.
    Raises: Diverged when the query loss or the meta-gradient stops being finite.
    """
    params = {name: value.detach().clone() for name, value in learner.init(params).items()}
    device = next(iter(params.values())).device
    optimisers = make_optimisers(params, outer)
    start, history = 0, list[Progress]()
    best, best_step, best_score = {name: value.clone() for name, value in params.items()}, 0, -1.0

    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        start, best_step, best_score = state["step"], state["best_step"], state["best_score"]
        history = [Progress(*row) for row in state["history"]]
        best = state["best"]
        for name, value in params.items():
            value.copy_(state["params"][name])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        generator.set_state(state["generator"].cpu())
        yield history[-1]

    first_rates = [[g.setdefault("first_lr", g["lr"]) for g in o.param_groups] for o in optimisers]
    losses = torch.zeros((), device=device)
    since = start
    for step in range(start, outer.meta_steps):
        for optimiser, rates in zip(optimisers, first_rates, strict=True):
            for group, first in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = first * rate(outer.schedule, step, outer.meta_steps)
        progress = torch.full((), step / outer.meta_steps, device=device)
        losses += meta_step(learner, loss, lambda: sample(generator, outer.meta_batch), params, optimisers, progress)

        done = step + 1
        validate = done % outer.validate_every == 0 or done == outer.meta_steps
        if not validate and done % report_every:
            continue
        query_loss = float(losses) / (done - since)
        if query_loss != query_loss:
            raise Diverged(f"the query loss or the meta-gradient stopped being finite between meta-steps {since} and {done}")
        accuracy = score(params) if validate else None
        history.append(Progress(done, query_loss, accuracy))
        if accuracy is not None and accuracy >= best_score:
            best, best_step, best_score = {name: value.clone() for name, value in params.items()}, done, accuracy
        losses, since = torch.zeros((), device=device), done
        if validate and checkpoint is not None:
            _save(
                checkpoint,
                step=done, best_step=best_step, best_score=best_score, best=best, params=params,
                optimisers=[o.state_dict() for o in optimisers], generator=generator.get_state(),
                history=[tuple(row) for row in history],
            )  # fmt: skip
        yield history[-1]
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    yield Result(best, best_step, best_score, history)


def _save(checkpoint: Path, **state: Any) -> None:
    """Whole or not at all."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    beside = checkpoint.with_suffix(".part")
    torch.save(state, beside)
    os.replace(beside, checkpoint)
