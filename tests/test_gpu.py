"""On a GPU: meta-gradients are those of the CPU, and a meta-step recorded as a CUDA graph trains as its kernels one by one."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from benchmarks.work import LEARNERS
from metalib import algorithms, training
from metalib.cuda_graph import Captured
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from metalib.randomness import generator
from metalib.types import MetaGradient, Params
from stages.command import prepared
from tests import problems
from tests.test_training import OPTIMISERS, every_optimiser, result, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def recorded(outer: dict[str, Any], **changes: Any) -> training.Result:
    """A training whose meta-step must be recorded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")
        trained = result(run(outer, seeds=(3, 4), device="cuda", **changes))
    assert trained.graph == "recorded"
    return trained


def one_by_one(outer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> training.Result:
    with monkeypatch.context() as patch:
        patch.setattr(training, "Captured", partial(Captured, plain_calls=10**9))
        return result(run(outer, seeds=(3, 4), device="cuda", **changes))


def alike(first: training.Result, second: training.Result, rtol: float) -> None:
    for one, other in zip(first.params, second.params, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
    for one, other in zip(first.history, second.history, strict=True):
        assert one.query_loss == pytest.approx(other.query_loss, rel=10 * rtol)


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_meta_gradients_are_those_of_the_cpu_in_float64(name: str) -> None:
    """Every learner on a network of 64 filters, in exact float32. Measured on an H200: errors of up to 1.1e-4."""
    want = meta_gradient(name, torch.device("cpu"), torch.float64)
    found = meta_gradient(name, prepared(), torch.float32)
    size = max(float(value.norm()) for value in want.values())
    for key, value in want.items():
        assert float((found[key].cpu().double() - value).norm()) <= 1e-3 * size, key


def test_tf32_rounds_a_gradient_and_no_more() -> None:
    """Of joint training, which has no inner loop to make more of it. Measured on an H200: 4e-4."""
    want = meta_gradient("finetune", torch.device("cpu"), torch.float64)
    found = meta_gradient("finetune", prepared(tf32=True), torch.float32)
    prepared()
    size = max(float(value.norm()) for value in want.values())
    error = max(float((found[key].cpu().double() - value).norm()) for key, value in want.items()) / size
    assert 1e-5 < error < 1e-2  # the roads of TF32 were taken, and they lead to the same place


def meta_gradient(name: str, device: torch.device, dtype: torch.dtype) -> Params:
    """Of random images, for one seed."""
    item = LEARNERS[name]
    weights, batch = item.data(device, dtype)
    weights = {key: value.unsqueeze(0) for key, value in weights.items()}
    loss, start = Conv4Loss(item.network()), torch.zeros((), device=device)
    return training.meta_gradient(item.make_learner(), loss, weights, batch, start).grads


@every_optimiser
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_graph_of_the_step_trains_as_its_kernels_one_by_one(
    optimiser: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: weights and query losses with and without the CUDA graph."""
    outer, changes = OPTIMISERS[optimiser], {"dtype": torch.float64, "chunk": chunk}
    alike(recorded(outer, **changes), one_by_one(outer, monkeypatch, **changes), 1e-6)


@pytest.mark.parametrize("downsample", ["stride", "maxpool"])
@pytest.mark.parametrize("name", algorithms.names())
def test_every_learner_is_recorded(
    name: str, downsample: Literal["stride", "maxpool"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, as pipelines train; few steps, so that rounding stays small."""
    prepared()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    net = Conv4(way=3, image_size=16, filters=4, downsample=downsample)
    starts = [net.init(generator(seed, "initial weights", device="cuda")) for seed in (3, 4)]
    changes = {"learner": problems.build(name), "loss": Conv4Loss(net), "params": starts}
    alike(recorded(OPTIMISERS["sgd"], **changes), one_by_one(OPTIMISERS["sgd"], monkeypatch, **changes), 1e-3)


def test_a_step_that_cannot_be_recorded_goes_on_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at a value on the host. Tasks drawn after the failed recording are those that would have been drawn."""

    class Curious:
        def __init__(self) -> None:
            self.maml = algorithms.build("maml", {"inner_lr": 0.4, "inner_steps": 1})
            self.init = self.maml.init

        def meta_gradient(self, *arguments: Any) -> MetaGradient:
            found = self.maml.meta_gradient(*arguments)
            found.query_loss.sum().item()
            return found

    with pytest.warns(UserWarning, match=r"no CUDA graph.*query_loss\.sum\(\)\.item\(\)"):
        curious = result(run(OPTIMISERS["adam"], seeds=(3, 4), device="cuda", dtype=torch.float64, learner=Curious()))
    alike(curious, one_by_one(OPTIMISERS["adam"], monkeypatch, dtype=torch.float64), 1e-6)


def test_a_killed_training_goes_on_with_its_graph(tmp_path: Path) -> None:
    """Killed after step 5, with the graph in use; taken up at step 4, and recorded again at step 8."""
    outer, checkpoint = OPTIMISERS["muon"] | {"meta_steps": 12}, tmp_path / "run.pt"
    for now in run(outer, checkpoint, seeds=(3, 4), device="cuda", dtype=torch.float64):
        assert isinstance(now, training.Progress)
        if now.step == 5:
            break
    taken_up = recorded(outer, checkpoint=checkpoint, dtype=torch.float64)
    alike(taken_up, recorded(outer, dtype=torch.float64), 1e-6)
