"""Inner-loop optimisers: functions from weights (T, *shape) and a support set to adapted weights (T, *shape)."""

from torch import Tensor

from metalib import tree
from metalib.types import Params, TaskLoss, Watch


def sgd(
    loss: TaskLoss,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    create_graph: bool = False,
    watch: Watch | None = None,
) -> Params:
    """Gradient descent on the whole support set: phi <- phi - lr grad L(phi), `steps` times.

    With `create_graph` the result stays a function of `params`, through every step (MAML differentiates it); without,
    it is cut loose at each step, so memory does not grow with `steps`.

    Args: x (T, S, ...), y (T, S), params (T, *shape). `watch` is shown the weights after 0, 1, ..., `steps` steps.
    """
    if not create_graph:
        params = tree.detach(params)
    if watch:
        watch(params)
    for _ in range(steps):
        grads = tree.grad(loss(params, x, y).sum(), params, create_graph)  # the sum keeps the tasks apart
        params = tree.axpy(-lr, grads, params)
        if not create_graph:
            params = tree.detach(params)
        if watch:
            watch(params)
    return params
