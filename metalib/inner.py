"""Inner-loop optimisers: functions from weights (T, *shape) and a support set to adapted weights (T, *shape).

All of them take x (T, S, ...), y (T, S) and show `watch` the weights after 0, 1, ..., `steps` steps. With
`batch`, a step uses that many images of the support set, in turn (see `minibatch`); None: every step uses all of them.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from metalib import tree
from metalib.types import Params, TaskLoss, Watch

# Descent diverges where rate times curvature exceeds 2. At a rate of 100 that is a curvature of 0.02, next to none for losses
# of order 1, as mean cross-entropies and squared errors are. The largest published inner rate is 2.
Rate = Annotated[float, Field(gt=0, le=100)]
BETA2, EPS = 0.999, 1e-8  # Adam's own


def sgd(
    loss: TaskLoss,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    batch: int | None = None,
    lam: float = 0.0,
    create_graph: bool = False,
    watch: Watch | None = None,
) -> Params:
    """Gradient descent: phi <- phi - lr grad L(phi), `steps` times.

    With `lam` the objective is proximal, L(phi) + lam/2 ||phi - phi_0||^2, phi_0 the weights it starts from.

    With `create_graph` the result stays a function of `params`, through every step (MAML differentiates it); without,
    it is detached at each step, so memory does not grow with `steps`.
    """
    if not create_graph:
        params = tree.detach(params)
    start = params
    if watch:
        watch(params)
    for step in range(steps):
        grads = tree.grad(loss(params, *minibatch(x, y, batch, step)).sum(), params, create_graph)  # the sum keeps tasks apart
        if lam:
            params = tree.map_with(lambda p, p0: torch.lerp(p, p0, lr * lam), params, start)  # p - lr lam (p - p0)
        params = tree.axpy(-lr, grads, params)
        if not create_graph:
            params = tree.detach(params)
        if watch:
            watch(params)
    return params


def nesterov(
    loss: TaskLoss, params: Params, x: Tensor, y: Tensor, *, lr: float, steps: int, lam: float, watch: Watch | None = None
) -> Params:
    """Nesterov's accelerated descent on the proximal objective G(phi) = L(phi) + lam/2 ||phi - phi_0||^2, without a graph.

    Constant momentum for a lam-strongly convex G of smoothness 1/lr (Nesterov 2004, scheme 2.2.11), kappa = 1/(lr lam):

        y = phi_j + (sqrt kappa - 1)/(sqrt kappa + 1) (phi_j - phi_{j-1}),      phi_{j+1} = y - lr grad G(y)
    """
    root = (lr * lam) ** 0.5
    momentum = (1 - root) / (1 + root)
    start = params = before = tree.detach(params)
    if watch:
        watch(params)
    for _ in range(steps):
        ahead = tree.detach(tree.axpy(momentum, tree.sub(params, before), params))
        grads = tree.axpy(lam, tree.sub(ahead, start), tree.grad(loss(ahead, x, y).sum(), ahead))
        before, params = params, tree.detach(tree.axpy(-lr, grads, ahead))
        if watch:
            watch(params)
    return params


def adam(
    loss: TaskLoss,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    batch: int | None = None,
    second: Params,
    weight: Tensor,
    watch: Watch | None = None,
) -> tuple[Params, Params, Tensor]:
    """Adam with beta1 = 0, the Reptile authors' inner optimiser (Kingma and Ba 2015; Nichol et al. 2018), without a graph.

        v <- beta2 v + (1 - BETA2) g^2,    phi <- phi - lr g / (sqrt(v / w) + eps)

    w = 1 - beta2^j, the total weight of the squared gradients in v, is Adam's bias correction. v (T, *shape) and w (T,) start
    from `second` and `weight`, zeros for a fresh start; they are returned with the weights.
    """
    params = tree.detach(params)
    if watch:
        watch(params)
    for step in range(steps):
        grads = tree.grad(loss(params, *minibatch(x, y, batch, step)).sum(), params)
        second = tree.map_with(lambda v, g: torch.lerp(v, g.square(), 1 - BETA2), second, grads)
        weight = torch.lerp(weight, torch.ones_like(weight), 1 - BETA2)
        squares = tree.scale(1 / weight, second)
        with torch.no_grad():
            params = tree.map_with(lambda p, g, v: torch.addcdiv(p, g, v.sqrt_().add_(EPS), value=-lr), params, grads, squares)
        params = tree.detach(params)
        if watch:
            watch(params)
    return params, second, weight


def minibatch(x: Tensor, y: Tensor, batch: int | None, step: int) -> tuple[Tensor, Tensor]:
    """The images of inner step 0, 1, ...: `batch` consecutive ones, going round, so that none comes again before all have been.

    The support set runs through the classes shot by shot (types.TaskBatch), so that a batch holds the classes as evenly as
    possible. A batch larger than the set is the whole set.
    """
    size = x.shape[1]
    if batch is None or batch >= size:
        return x, y
    first = step * batch % size
    end = first + batch
    if end <= size:
        return x[:, first:end], y[:, first:end]
    return torch.cat([x[:, first:], x[:, : end - size]], 1), torch.cat([y[:, first:], y[:, : end - size]], 1)
