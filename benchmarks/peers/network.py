"""The network as a function of one task's weights and images, and what every peer needs around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalib.types import Params, TaskBatch

Call = Callable[[], Params]
Hyper = dict[str, Any]


class Task(NamedTuple):
    """One task's images (B, 1, H, W), labels (B,) and classes (way,), or those of all tasks, (T, ...)."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor


def together(batch: TaskBatch) -> Task:
    assert batch.classes is not None
    return Task(batch.support_x, batch.support_y, batch.query_x, batch.query_y, batch.classes)


def tasks_of(batch: TaskBatch) -> list[Task]:
    return [Task(*one) for one in zip(*together(batch), strict=True)]


def to_theirs(params: Params) -> Params:
    """Copies of the meta-parameters, kernels (out, 3, 3, in) as (out, in, 3, 3)."""
    return {name: (p.permute(0, 3, 1, 2) if p.ndim == 4 else p).detach().clone().contiguous() for name, p in params.items()}


def to_ours(grads: Params) -> Params:
    return {name: g.detach().permute(0, 2, 3, 1) if g.ndim == 4 else g.detach() for name, g in grads.items()}


def library_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, scale, shift, training=True)


def written_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Batch norm for grad of vmap, where torch 2.14 gets the second derivative of F.batch_norm wrong."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return torch.addcmul(shift[:, None, None], x - mean, torch.rsqrt(var + 1e-5) * scale[:, None, None])


def features(weights: Params, x: Tensor, norm: Callable[[Tensor, Tensor, Tensor], Tensor] = library_norm) -> Tensor:
    for layer in (1, 2, 3, 4):
        x = F.conv2d(x, weights[f"conv{layer}.weight"], stride=2, padding=1)
        x = F.relu(norm(x, weights[f"norm{layer}.weight"], weights[f"norm{layer}.bias"]))
    return x.mean((2, 3))


def head_loss(weights: Params, features: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weights["head.weight"], weights["head.bias"]), y)


def task_loss(weights: Params, x: Tensor, y: Tensor) -> Tensor:
    return head_loss(weights, features(weights, x), y)


def grad(of: Tensor, at: Params, create_graph: bool = False) -> Params:
    return dict(zip(at, torch.autograd.grad(of, list(at.values()), create_graph=create_graph), strict=True))


def leaves(weights: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in weights.items()}


def flat(weights: Params) -> Tensor:
    return torch.cat([value.reshape(-1) for value in weights.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def cg(matvec: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Conjugate gradient; a direction without positive curvature ends it (b itself, when it is the first)."""
    x, r, p = torch.zeros_like(b), b, b
    rr = r @ r
    going = rr > 0
    for step in range(steps):
        ap = matvec(p)
        curvature = p @ ap
        going = going & (curvature > 0)
        alpha = torch.where(going, rr / curvature, 1.0 if step == 0 else 0.0)
        x, r = x + alpha * p, r - alpha * ap
        after = r @ r
        p, rr = r + after / rr * p, after
    return x
