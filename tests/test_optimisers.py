"""The outer optimisers beside torch.optim's, step by step; and how few operations a step is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metalib.optimisers import Optimiser
from metalib.randomness import generator
from metalib.types import Params
from tests.problems import Operations

SHAPES: dict[str, tuple[int, ...]] = {  # kernels of three shapes as matrices, one of them taller than wide; names out of order
    "conv1.weight": (4, 3, 3, 1), "head.weight": (5, 6), "conv2.weight": (4, 3, 3, 4), "conv3.weight": (20, 3, 3, 2),
    "norm.bias": (6,), "conv4.weight": (4, 3, 3, 4), "conv5.weight": (9, 3, 3, 1), "rate": (),
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1}, "adam": {"lr": 0.01}, "muon": {"lr": 0.01, "kernel_lr": 0.02, "kernel_decay": 0.1},
}  # fmt: skip
every_rule = pytest.mark.parametrize("rule", list(RULES))


def normal(replicas: int, seed: int, dtype: torch.dtype = torch.float64) -> Params:
    random = generator(seed, "normal")
    return {name: torch.randn(replicas, *shape, generator=random, dtype=dtype) for name, shape in SHAPES.items()}


def torchs(rule: str, params: Params) -> list[torch.optim.Optimizer]:
    """torch.optim's own, over views of the parameters; Muon's see one replica's kernels of one layer at a time."""
    given = RULES[rule]
    if rule == "sgd":
        return [torch.optim.SGD(params.values(), **given)]
    kernels = [name for name in SHAPES if rule == "muon" and name.startswith("conv") and SHAPES[name][-1] > 1]
    adam = torch.optim.Adam([value for name, value in params.items() if name not in kernels], lr=given["lr"])
    if rule == "adam":
        return [adam]
    matrices = [matrix for name in kernels for matrix in params[name].flatten(2).unbind()]
    return [adam, torch.optim.Muon(matrices, lr=given["kernel_lr"], weight_decay=given["kernel_decay"])]


def distances(rule: str, replicas: int, dtype: torch.dtype, factors: tuple[float, ...]) -> list[float]:
    """How far the parameters are from torch's after each step, relative to the way that the furthest moved one has gone."""
    mine, theirs = Optimiser(normal(replicas, 0, dtype), rule, **RULES[rule]), normal(replicas, 0, dtype)  # type: ignore[arg-type]
    optimisers, found = torchs(rule, theirs), []
    for step, factor in enumerate(factors):
        grads = normal(replicas, step + 1, dtype)
        before = {name: value.clone() for name, value in theirs.items()}
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                for value in group["params"]:
                    value.grad = of(value, theirs, grads)
            optimiser.step()
        for name, value in theirs.items():
            value.copy_(torch.lerp(before[name], value, factor))
        mine.step(mine.flat(grads), torch.full((replicas,), factor))
        start = normal(replicas, 0, dtype)
        found.append(max(float((mine.params[n] - v).norm() / (v - start[n]).norm()) for n, v in theirs.items()))
    return found


def of(value: Tensor, params: Params, grads: Params) -> Tensor:
    """The gradient of a parameter, or of one replica's kernels as a matrix."""
    for name, whole in params.items():
        if value is whole:
            return grads[name]
        for r, one in enumerate(whole):
            if value.data_ptr() == one.data_ptr() and value.ndim == 2 and one.ndim == 4:
                return grads[name][r].flatten(1)
    raise AssertionError("a parameter of no name")


@every_rule
@pytest.mark.parametrize("replicas", [1, 3])
def test_steps_are_those_of_torch(rule: str, replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, torch's Muon without its rounding to bfloat16; whole steps and parts of steps.

    Seen failing without Nesterov's momentum, without Adam's correction, without decay, and with the rate of wide matrices
    for tall ones.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    assert max(distances(rule, replicas, torch.float64, (1, 1, 0.5, 1, 0.25, 1))) < 1e-9


def test_muons_rounding_is_all_that_differs() -> None:
    """torch.optim.Muon as it is, in bfloat16: steps differ by a hundredth, which is its rounding."""
    assert max(distances("muon", 2, torch.float32, (1, 1, 1))) < 0.03


@every_rule
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_replica_without_length_stays(rule: str, replicas: int) -> None:
    optimiser, start = Optimiser(normal(replicas, 0), rule, **RULES[rule]), normal(replicas, 0)  # type: ignore[arg-type]
    length = torch.ones(replicas)
    length[-1] = 0
    for step in range(3):
        optimiser.step(optimiser.flat(normal(replicas, step + 1)), length)
    for name, value in optimiser.params.items():
        assert torch.equal(value[-1], start[name][-1])
        assert not any(torch.equal(value[r], start[name][r]) for r in range(replicas - 1))


@every_rule
def test_a_fixed_head_is_not_touched(rule: str) -> None:
    optimiser, start = Optimiser(normal(2, 0), rule, fixed_head=True, **RULES[rule]), normal(2, 0)  # type: ignore[arg-type]
    optimiser.step(optimiser.flat(normal(2, 1)), torch.ones(2))
    assert list(optimiser.params) == list(start)
    for name, value in optimiser.params.items():
        assert torch.equal(value, start[name]) == name.startswith("head."), name


@every_rule
def test_state_that_is_taken_up_goes_on_to_the_bit(rule: str) -> None:
    """Seen failing without Adam's totals in the state."""
    whole, half = (Optimiser(normal(2, 0), rule, **RULES[rule]) for _ in range(2))  # type: ignore[arg-type]
    for step in range(4):
        whole.step(whole.flat(normal(2, step)), torch.ones(2))
        half.step(half.flat(normal(2, step)), torch.ones(2))
        kept, half = half, Optimiser(half.params, rule, **RULES[rule])  # type: ignore[arg-type]
        half.load(kept.state)
    assert all(torch.equal(value, half.params[name]) for name, value in whole.params.items())


@pytest.mark.parametrize(("rule", "most"), [("sgd", 2), ("adam", 10), ("muon", 36)])
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_step_is_few_operations(rule: str, most: int, replicas: int) -> None:
    """Of three layers and all replicas at once: more layers, or more replicas, are not more operations."""
    shapes = {f"conv{layer}.weight": (8, 3, 3, 8 if layer > 1 else 1) for layer in range(1, 5)} | {"norm1.bias": (8,)}
    params = {name: torch.empty(replicas, *shape, device="meta") for name, shape in shapes.items()}
    optimiser = Optimiser(params, rule, **RULES[rule])  # type: ignore[arg-type]
    grads, length = optimiser.flat(params), torch.empty(replicas, device="meta")
    with Operations() as seen:
        optimiser.step(grads, length)
    assert sum(seen.count.values()) <= most, seen.count
