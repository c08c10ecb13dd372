"""Tasks with known answers, and slow references to compare with."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ruamel.yaml import YAML
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metalib import algorithms, tree
from metalib.models.conv4 import Conv4
from metalib.types import MetaLearner, Params, TaskBatch


def line_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Half the squared error of y = w . x, summed over the set. w (T, d), x (T, B, d), y (T, B)."""
    return 0.5 * ((torch.einsum("tbd,td->tb", x, params["w"]) - y) ** 2).sum(1)


class SmoothLoss:
    """Cross-entropy of a small tanh network: no kinks, so finite differences can be trusted. x (T, B, 3), y (T, B).

    The scale of its hidden units goes by the name of a batch norm, for learners that treat batch norm's weights apart.
    """

    def __call__(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        return self.head(params, self.body(params, x), y)

    def body(self, params: Params, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("tbd,thd->tbh", x, params["a"]) + params["b"].unsqueeze(1))
        return hidden * params["norm.weight"].unsqueeze(1)

    def head(self, params: Params, features: Tensor, y: Tensor) -> Tensor:
        weight, bias = (params[n].repeat_interleave(len(features) // len(params[n]), 0) for n in ("head.weight", "head.bias"))
        logits = torch.einsum("tbh,tch->tbc", features, weight) + bias.unsqueeze(1)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


smooth_loss = SmoothLoss()


def smooth_problem(tasks: int = 4, way: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Params, TaskBatch]:
    """Weights and tasks for `smooth_loss`."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    params = {"a": normal(5, 3), "b": normal(5), "norm.weight": 1 + 0.1 * normal(5)}
    params |= {"head.weight": normal(way, 5), "head.bias": normal(way)}
    labels = torch.arange(way).repeat(2).expand(tasks, -1)  # shot by shot
    classes = torch.arange(tasks * way).view(tasks, way) * 4
    return params, TaskBatch(normal(tasks, 2 * way, 3), labels, normal(tasks, 2 * way, 3), labels, classes)


def mean_quadratic_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean over the set of (w - b)' A (w - b) / 2. w (T, d), A = x (T, B, d, d), b = y (T, B, d): quadratics for images."""
    away = params["w"].unsqueeze(1) - y
    return 0.5 * torch.einsum("tbi,tbij,tbj->tb", away, x, away).mean(1)


def quadratics(tasks: int, count: int, size: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (T, B, d, d), symmetric with eigenvalues near 1, and b (T, B, d) for `mean_quadratic_loss`."""
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(tasks, count, size, size, generator=random, dtype=torch.float64)
    b = torch.randn(tasks, count, size, generator=random, dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64) + 0.2 * (a + a.mT), b


def losses_and_gradients(loss: object, phi: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
    """Every task's loss (T,) and gradient (T, *shape), without a graph."""
    leaves = {name: value.detach().requires_grad_() for name, value in phi.items()}
    value = loss(leaves, x, y)  # type: ignore[operator]
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value.sum(), list(leaves.values())), strict=True))


def peak_saved(run: Callable[[], object]) -> int:
    """The most bytes that autograd keeps for backward passes at any moment of run()."""
    live = peak = 0

    class Kept:
        def __init__(self, value: Tensor) -> None:
            nonlocal live, peak
            self.value = value.detach()
            live += value.nbytes
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.value.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
        run()
    assert live == 0  # nothing outlives the call
    return peak


class Operations(TorchDispatchMode):
    """Counts operations that launch kernels on a GPU: not views of tensors, nor memory that nothing is written to."""

    FREE = ("_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def image_batch(tasks: int, way: int, shot: int, query: int, dtype: torch.dtype = torch.float64, size: int = 28) -> TaskBatch:
    """Random drawings: about a tenth of the pixels is ink."""
    random = torch.Generator().manual_seed(1)

    def images(count: int) -> Tensor:
        return (torch.rand(tasks, count, 1, size, size, generator=random) < 0.1).to(dtype)

    def labels(each: int) -> Tensor:
        return torch.arange(way).repeat(each).expand(tasks, -1)

    classes = torch.arange(tasks * way).view(tasks, way) * 4
    return TaskBatch(images(way * shot), labels(shot), images(way * query), labels(query), classes)


def network(dtype: torch.dtype = torch.float64, way: int = 5, **choices: object) -> tuple[Conv4, Params]:
    """A Conv4 with weights that are no special case: batch norm's scale and shift differ from 1 and 0."""
    net = Conv4(way=way, **choices)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.1 * torch.randn(value.shape, generator=random) if value.ndim == 1 else value
        for name, value in net.init(random).items()
    }
    return net, {name: value.to(dtype) for name, value in weights.items()}


def task(batch: TaskBatch, t: int) -> TaskBatch:
    """Task t alone, as a batch of one."""
    return TaskBatch(*(None if part is None else part[t : t + 1] for part in batch))


def objective(learner: MetaLearner, loss: object, params: Params, batch: TaskBatch) -> float:
    """The query loss after adaptation, mean over tasks: what MAML minimises."""
    phi = learner.adapt(loss, params, batch.support_x, batch.support_y)  # type: ignore[arg-type]
    return float(loss(phi, batch.query_x, batch.query_y).detach().mean())  # type: ignore[operator]


def slope(f: object, params: Params, direction: Params, step: float = 1e-5) -> float:
    """Central difference of f(params) along `direction`."""
    ahead, behind = (tree.axpy(sign * step, direction, params) for sign in (1.0, -1.0))
    return (f(ahead) - f(behind)) / (2 * step)  # type: ignore[operator]


def directions(params: Params, count: int = 5) -> list[Params]:
    random = torch.Generator().manual_seed(3)
    return [
        {name: torch.randn(value.shape, generator=random, dtype=value.dtype) for name, value in params.items()}
        for _ in range(count)
    ]


def inner_product(a: Params, b: Params) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


HYPER: dict[str, dict[str, object]] = {  # what is tested does not change when params.yaml is tuned
    "anil": {"inner_lr": 0.2, "inner_steps": 3},
    "finetune": {"inner_lr": 0.1, "inner_steps": 10, "classes": 6492},
    "fomaml": {"inner_lr": 0.1, "inner_steps": 5},
    "imaml": {
        "inner_lr": 0.15, "inner_steps": 5, "inner_optimiser": "sgd", "proximal": "each", "lam": 0.5,
        "solver": "cg", "cg_steps": 2, "damping": 1.0, "lam_damping": 10.0,
    },
    "imaml_hf": {
        "inner_lr": 1.0, "inner_steps": 2, "lam": 2.0, "cg_steps": 2, "damping": 1.0, "lam_damping": 10.0, "halvings": 1,
    },
    "leap": {"inner_lr": 0.2, "inner_steps": 5, "inner_batch": 10, "norm": True, "loss": True, "stabiliser": True},
    "maml": {"inner_lr": 0.4, "inner_steps": 1},
    "maml_plus_plus": {"inner_lr": 0.4, "inner_steps": 2, "msl": 0.1},
    "maml_truncated": {"inner_lr": 0.15, "inner_steps": 4, "backprop_steps": 2},
    "meta_sgd": {"inner_lr": 0.4, "inner_steps": 1},
    "reptile": {"inner_lr": 0.2, "inner_steps": 5, "inner_batch": 10, "inner_optimiser": "sgd"},
    "scratch": {"inner_lr": 0.4, "inner_steps": 10},
}  # fmt: skip


def hyper(name: str) -> dict[str, object]:
    """The learner's hyper-parameters; a learner that is not in the table has its own of params.yaml, budget quick."""
    if name in HYPER:
        return HYPER[name]
    with open("params.yaml") as file:
        section = YAML(typ="safe").load(file)["algorithms"][name]["quick"]["common"]
    return {key: value for key, value in section.items() if key not in ("network", "outer", "test", "train")}


ADAM = {"inner_optimiser": "adam", "inner_lr": 0.01, "moments": "reset"}
VARIANTS: dict[str, dict[str, object]] = {  # ways through a learner that HYPER does not take
    "maml:batches": {"inner_steps": 3, "inner_batch": 4},  # of six images: the second step goes round
    "maml:recompute": {"inner_steps": 3, "inner_batch": 4, "recompute": True},
    "fomaml:batches": {"inner_steps": 3, "inner_batch": 4},
    "reptile:adam": ADAM,
    "reptile:carried": ADAM | {"moments": "carried"},
    "reptile:batches": {"inner_batch": 4},
    "leap:batches": {"inner_batch": 4},
    "leap:energy": {"norm": False},
    "leap:weights": {"loss": False},
    "imaml:undamped": {"damping": 0.0, "lam_damping": 0.0},
    "imaml:nesterov": {"inner_optimiser": "nesterov"},
    "imaml:neumann": {"solver": "neumann"},
    "imaml:released": {"proximal": "last"},
    "imaml:first-order": {"cg_steps": 0},
    "imaml_hf:undamped": {"damping": 0.0, "lam_damping": 0.0},
}


def cases() -> list[str]:
    """Every learner, and the variants."""
    return [*algorithms.names(), *VARIANTS]


def build(case: str, **changes: object) -> MetaLearner:
    name = case.partition(":")[0]
    return algorithms.build(name, hyper(name) | VARIANTS.get(case, {}) | changes)


def quadratic_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """(w - y)' x (w - y) / 2 of each task. w (T, d), x (T, d, d) symmetric, y (T, d)."""
    away = params["w"] - y
    return 0.5 * torch.einsum("ti,tij,tj->t", away, x, away)


def spd(conditions: list[float], size: int, seed: int = 0) -> Tensor:
    """A matrix of each condition number, (T, d, d): eigenvalues from 1 up, log-spaced, random eigenvectors."""
    random = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(len(conditions), size, size, generator=random, dtype=torch.float64))
    powers = torch.linspace(0, 1, size, dtype=torch.float64)
    values = torch.tensor(conditions, dtype=torch.float64)[:, None] ** powers
    return axes @ torch.diag_embed(values) @ axes.mT


def quadratic_problem(conditions: list[float], size: int = 4) -> tuple[Params, TaskBatch]:
    """Weights and tasks for `quadratic_loss`; the query's matrices and minima are others."""
    random = torch.Generator().manual_seed(2)
    w, *minima = torch.randn(1 + 2 * len(conditions), size, generator=random, dtype=torch.float64)
    b, c = torch.stack(minima).chunk(2)
    return {"w": w}, TaskBatch(spd(conditions, size), b, spd(conditions, size, seed=1), c)
