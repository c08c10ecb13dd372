"""MAML's sinusoid regression (Finn et al. 2017, section 5.1), on a network and a loss that metalib has never seen.

A task is a sine of its own amplitude and phase; ten points of it are the support set, ten others the query set. What a learner
needs is the loss of each task's weights on each task's points. Run it from the project's root: python -m examples.sinusoid
"""

from itertools import pairwise
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from metalib import algorithms
from metalib.types import MetaLearner, Params, TaskBatch

matplotlib.use("Agg")  # into a file: no screen is needed

IMPLICIT = {"inner_optimiser": "sgd", "proximal": "each", "solver": "cg", "damping": 0.0, "lam_damping": 0.0}
LEARNERS: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.01, "inner_steps": 5},
    "fomaml": {"inner_lr": 0.01, "inner_steps": 5},
    "reptile": {"inner_lr": 0.02, "inner_steps": 10, "inner_optimiser": "sgd"},
    "imaml": {"inner_lr": 0.01, "inner_steps": 10, "lam": 0.5, "cg_steps": 5, **IMPLICIT},
}


def network(params: Params, x: Tensor) -> Tensor:
    """Two hidden layers of 40 units. Weights (T, *shape), x (T, B, 1) -> (T, B)."""
    for layer in ("1", "2"):
        x = torch.relu(torch.baddbmm(params["bias" + layer].unsqueeze(1), x, params["weight" + layer]))
    return torch.baddbmm(params["bias3"].unsqueeze(1), x, params["weight3"]).squeeze(2)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error of each task, (T,)."""
    return (network(params, x) - y).square().mean(1)


def sines(count: int, query_points: int = 10) -> TaskBatch:
    """Tasks with amplitudes from 0.1 to 5 and phases from 0 to pi."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(count, 1), torch.pi * torch.rand(count, 1)
    support, query = 10 * torch.rand(count, 10) - 5, 10 * torch.rand(count, query_points) - 5
    return TaskBatch(
        support.unsqueeze(2), amplitude * torch.sin(support - phase), query.unsqueeze(2), amplitude * torch.sin(query - phase)
    )


def meta_train(name: str, meta_steps: int, meta_batch: int = 25) -> tuple[MetaLearner, Params]:
    """A learner and its meta-parameters after meta-training with Adam."""
    torch.manual_seed(0)
    params = {}
    for layer, (before, after) in enumerate(pairwise([1, 40, 40, 1]), 1):  # as torch.nn.Linear begins
        bound = before**-0.5
        params[f"weight{layer}"] = torch.empty(before, after).uniform_(-bound, bound)
        params[f"bias{layer}"] = torch.empty(after).uniform_(-bound, bound)
    learner = algorithms.build(name, LEARNERS[name])
    params = learner.init(params)
    outer = torch.optim.Adam(params.values(), lr=0.002)
    for _ in range(meta_steps):
        grads, _ = learner.meta_gradient(loss, params, sines(meta_batch))
        for key, value in params.items():
            value.grad = grads[key]
        outer.step()
    return learner, params


def main(path: str = "sinusoid.png", meta_steps: int = 1000) -> None:
    """Print each learner's query loss before and after adaptation, and draw how it adapts to one task, in sinusoid.png."""
    figure, axes = plt.subplots(1, len(LEARNERS), figsize=(4 * len(LEARNERS), 3.5), sharey=True, layout="constrained")
    grid = torch.linspace(-5, 5, 200)
    for name, axis in zip(LEARNERS, axes, strict=True):
        learner, params = meta_train(name, meta_steps)
        torch.manual_seed(2)
        tasks, seen = sines(100, query_points=200), list[Params]()
        learner.adapt(loss, params, tasks.support_x, tasks.support_y, seen.append)
        before, after = (loss(weights, tasks.query_x, tasks.query_y).mean().item() for weights in (seen[0], seen[-1]))
        print(f"{name}: query loss {before:.3f} before adaptation, {after:.3f} after {len(seen) - 1} steps")
        axis.plot(tasks.query_x[0, :, 0], tasks.query_y[0], ".", color="0.8", label="the sine")
        axis.plot(tasks.support_x[0, :, 0], tasks.support_y[0], "k^", label="support")
        for step, style in ((0, ":"), (1, "--"), (len(seen) - 1, "-")):
            curve = network(seen[step], grid.expand(100, -1).unsqueeze(2))[0].detach()
            axis.plot(grid, curve, style, label=f"after {step} step{'s' * (step != 1)}")
        axis.set(title=name, xlabel="x")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
