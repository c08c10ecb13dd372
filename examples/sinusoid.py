"""Sinusoid regression (Finn et al. 2017, section 5.1): metalib on a network and a loss of one's own.

    python -m examples.sinusoid imaml      # or another of LEARNERS; draws sinusoid.png

A task is a sine of random amplitude and phase; ten of its points are the support set, ten others the query set.
"""

import sys
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Generator, Tensor, vmap

from metalib import algorithms, training
from metalib.types import Params, TaskBatch

LEARNERS: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.02, "inner_steps": 5},
    "fomaml": {"inner_lr": 0.02, "inner_steps": 5},
    "meta_sgd": {"inner_lr": 0.02, "inner_steps": 5},
    "reptile": {"inner_lr": 0.02, "inner_steps": 5, "inner_batch": None, "inner_optimiser": "sgd"},
    "imaml": {"inner_lr": 0.02, "inner_steps": 5, "inner_optimiser": "sgd", "proximal": "each", "lam": 1.0,
              "solver": "cg", "cg_steps": 5, "damping": 0.0, "lam_damping": 0.0},
}  # fmt: skip


def network(params: Params, x: Tensor) -> Tensor:
    """A plain MLP, of one task: (B, 1) -> (B, 1)."""
    x = torch.tanh(x @ params["w1"] + params["b1"])
    x = torch.tanh(x @ params["w2"] + params["b2"])
    return x @ params["w3"] + params["b3"]


@vmap
def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error, of one task; vmap turns it into that of T tasks, (T,)."""
    return (network(params, x) - y).square().mean()


def initial(random: Generator, width: int = 40) -> Params:
    params = {}
    for layer, (wide, next_wide) in enumerate([(1, width), (width, width), (width, 1)], 1):
        params[f"w{layer}"] = torch.randn(wide, next_wide, generator=random) / wide**0.5
        params[f"b{layer}"] = torch.randn(next_wide, generator=random)
    return params


def draw(random: Generator, count: int) -> TaskBatch:
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, generator=random)
    phase = torch.pi * torch.rand(count, 1, 1, generator=random)
    x = 10 * torch.rand(count, 20, 1, generator=random) - 5
    y = amplitude * torch.sin(x - phase)
    return TaskBatch(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


def main(name: str = "maml", meta_steps: int = 1000, picture: str = "sinusoid.png") -> None:
    """Meta-train, then draw how the initial weights adapt to three new tasks."""
    learner = algorithms.build(name, LEARNERS[name])
    validation, test = draw(Generator().manual_seed(1), 200), draw(Generator().manual_seed(2), 3)

    def score(params: Params) -> float:
        """Higher is better."""
        adapted = learner.adapt(loss, params, validation.support_x, validation.support_y)
        return -float(loss(adapted, validation.query_x, validation.query_y).detach().mean())

    random = Generator().manual_seed(0)
    outer = training.Outer(optimiser="adam", lr=0.003, schedule="cosine", meta_steps=meta_steps, meta_batch=25, validations=5)
    for now in training.train(
        learner, loss, [initial(random)], lambda g, count: draw(g[0], count), score, outer, generators=[random]
    ):
        if isinstance(now, training.Result):
            params = now.params[0]
        elif now.validation:
            print(f"{name}: mean squared error {-now.validation[0]:.2f} after {now.step} meta-steps")

    weights = list[Params]()  # after 0, 1, ... inner steps
    learner.adapt(loss, params, test.support_x, test.support_y, watch=weights.append)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), sharey=True, layout="constrained")
    x = torch.linspace(-5, 5, 200).view(1, 200, 1).expand(3, 200, 1)
    for steps in (0, 1, len(weights) - 1):
        curves = vmap(network)(weights[steps], x).detach()
        for axis, curve in zip(axes, curves, strict=True):
            axis.plot(x[0], curve, label=f"{steps} inner steps")
    for task, axis in enumerate(axes):
        axis.plot(test.support_x[task], test.support_y[task], "k^", label="support")
        axis.plot(test.query_x[task], test.query_y[task], "k.", label="query")
    axes[0].legend()
    figure.savefig(picture)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "maml")
