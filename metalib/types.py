"""The types every part of metalib speaks, and the legend of shapes.

    T      tasks in a batch (the leading axis of everything that belongs to a task)
    way    classes in a task             shot   support images per class
    S      way * shot, support images    Q      way * query, query images
    B      images of one task, S or Q    H, W   height and width in pixels

Meta-parameters have their own shape, (*shape); weights adapted to tasks have (T, *shape). Tasks are independent, so the
gradient of the summed loss holds every task's own gradient, and "for each task" needs no Python loop.

Names: kernels of convolutions begin with "conv", weights of batch norm with "norm", of the last layer with "head."; the
meta-parameters that a learner adds begin otherwise. A learner that treats some weights differently goes by these names.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]
TaskLoss = Callable[[Params, Tensor, Tensor], Tensor]
"""(weights (T, *shape), x (T, B, ...), y (T, B)) -> mean loss of each task, (T,)."""


class SplitLoss(Protocol):
    """A TaskLoss in two halves: loss(params, x, y) = head(params, body(params, x), y).

    The head reads only the weights whose names begin with "head.", the body only the others.
    """

    def __call__(self, params: Params, x: Tensor, y: Tensor) -> Tensor: ...

    def body(self, params: Params, x: Tensor) -> Tensor:
        """x (T, B, ...) -> features (T, B, F)."""
        ...

    def head(self, params: Params, features: Tensor, y: Tensor) -> Tensor:
        """Features (T, B, F), y (T, B) -> mean loss of each task, (T,); weights (1, *shape) serve all tasks,
        of weights (R, *shape) each set serves T / R consecutive tasks."""
        ...


def need_halves(learner: str, loss: TaskLoss, params: Params) -> None:
    """ValueError unless the loss is a SplitLoss and some of the weights are its head's."""
    if not hasattr(loss, "body") or not hasattr(loss, "head"):
        raise ValueError(
            f"{learner}: the loss must come in two halves, body and head (metalib.types.SplitLoss), but it is whole"
        )
    if not any(name.startswith("head.") for name in params):
        raise ValueError(f"{learner}: the names of the last layer's weights must begin with 'head.', got {', '.join(params)}")


Watch = Callable[[Params], None]
"""Called with the weights (T, *shape) after 0, 1, 2, ... inner steps."""


class TaskBatch(NamedTuple):
    """T tasks. Labels are positions within the task; `classes` says which class of the data each stands for.

    The support set runs through the classes shot by shot, so that any `way` images in a row have one of each class.
    """

    support_x: Tensor  # (T, S, 1, H, W) float, ink 1 on paper 0
    support_y: Tensor  # (T, S) int64 in [0, way)
    query_x: Tensor  # (T, Q, 1, H, W)
    query_y: Tensor  # (T, Q)
    classes: Tensor | None = None  # (T, way) int64, 4 * character + quarter turns


class MetaGradient(NamedTuple):
    """What an algorithm returns: a gradient for the outer optimiser, never a step."""

    grads: Params  # names and shapes of the meta-parameters
    query_loss: Tensor  # (T,), each task's after adaptation, detached


class MetaLearner(Protocol):
    """A meta-learning algorithm. It knows neither networks nor images, and keeps nothing between calls."""

    def init(self, params: Params) -> Params:
        """Meta-parameters from the network's initial weights; a learner may add its own, such as inner rates."""
        ...

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        """Adapted weights (T, *shape) from meta-parameters and support x (T, S, ...), y (T, S), without a graph."""
        ...

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        """Gradient of the mean query loss over tasks; `progress`, 0-dim in [0, 1], is the fraction of training done."""
        ...
