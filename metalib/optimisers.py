"""The outer optimisers in few operations: weights, gradients and state of all R replicas are flat tensors (R, n).

On a GPU a meta-step's kernels are shorter than their launches, of which torch.optim wants several for every tensor. The steps
are torch.optim's, to rounding; the tests compare them.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from metalib import tree
from metalib.types import Params

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's own
MOMENTUM, SMALLEST = 0.95, 1e-7  # Muon's own
QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's a x + b x^3 + c x^5, which takes singular values towards 1


class Rule(Protocol):
    """An optimiser of weights (R, n). Its state changes in place, so that a CUDA graph finds it."""

    state: dict[str, Tensor]

    def ahead(self, weights: Tensor, grads: Tensor) -> Tensor:
        """Where a whole step leads, (R, n)."""
        ...


class SGD:
    """w - lr g."""

    def __init__(self, weights: Tensor, *, lr: float):
        self.state: dict[str, Tensor] = {}
        self._lr = lr

    def ahead(self, weights: Tensor, grads: Tensor) -> Tensor:
        return torch.add(weights, grads, alpha=-self._lr)


class Adam:
    """Kingma and Ba 2015, https://arxiv.org/abs/1412.6980."""

    def __init__(self, weights: Tensor, *, lr: float):
        totals = weights.new_zeros(2)  # of the weights in either mean, 1 - beta^t: what its bias is corrected by
        self.state = {"mean": torch.zeros_like(weights), "square": torch.zeros_like(weights), "totals": totals}
        self._lr, self._ones, self._rates = lr, torch.ones_like(totals), weights.new_tensor([1 - BETA1, 1 - BETA2])

    def ahead(self, weights: Tensor, grads: Tensor) -> Tensor:
        mean, square, totals = self.state["mean"], self.state["square"], self.state["totals"]
        mean.lerp_(grads, 1 - BETA1)
        square.mul_(BETA2).addcmul_(grads, grads, value=1 - BETA2)
        totals.lerp_(self._ones, self._rates)
        return torch.addcdiv(weights, mean / totals[0], (square / totals[1]).sqrt_().add_(EPS), value=-self._lr)


class Muon:
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon: momentum, made orthogonal by Newton-Schulz iterations.

    All matrices, n / (rows columns) for each replica, go through the iteration at once, in the weights' precision. (torch's
    takes them one by one in bfloat16, which is 20 times slower on a CPU without it, and no faster on matrices this small.)
    """

    def __init__(self, weights: Tensor, *, shape: tuple[int, int], lr: float, decay: float):
        self.state = {"momentum": torch.zeros_like(weights)}
        self._shape, self._decay = shape, lr * decay
        self._lr = lr * max(1, shape[0] / shape[1]) ** 0.5

    def ahead(self, weights: Tensor, grads: Tensor) -> Tensor:
        momentum = self.state["momentum"].lerp_(grads, 1 - MOMENTUM)
        matrices = grads.lerp(momentum, MOMENTUM).reshape(-1, *self._shape)  # Nesterov's
        return torch.add(weights * (1 - self._decay), orthogonal(matrices).reshape(weights.shape), alpha=-self._lr)


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns) with all singular values near 1 (0.7 to 1.2), the singular vectors as they were; zeros stay zeros."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=SMALLEST)
    a, b, c = QUINTIC
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimiser:
    """Holds R replicas' meta-parameters and changes them; `params` are views of one tensor (R, N).

    Muon leaves the first layer's kernels to Adam: with one input channel they are hardly matrices, and an orthogonal
    step would be several times longer for them than for the others. A fixed head belongs to no rule (Kao, Chiu, Chen
    2022, https://arxiv.org/abs/2106.15367, "zeroing trick": labels are random, so all it could learn is noise).

    Args:
        params: the initial ones, (R, *shape), which are copied.
        rule: of all weights; muon: of convolution kernels, and adam of the others.
        lr: of sgd or adam.
        kernel_lr, kernel_decay: of muon, and its weight decay.
    """

    def __init__(
        self,
        params: Params,
        rule: Literal["adam", "sgd", "muon"],
        *,
        lr: float,
        kernel_lr: float | None = None,
        kernel_decay: float | None = None,
        fixed_head: bool = False,
    ):
        learned = tree.without(params, "head.") if fixed_head else params
        parts = list[tuple[list[str], Callable[[Tensor], Rule]]]()
        if rule == "muon":
            assert kernel_lr is not None and kernel_decay is not None
            kernels = {name: _matrix(value) for name, value in tree.part(learned, "conv").items() if value.shape[-1] > 1}
            for shape in dict.fromkeys(kernels.values()):
                alike = [name for name in kernels if kernels[name] == shape]
                parts.append((alike, partial(Muon, shape=shape, lr=kernel_lr, decay=kernel_decay)))
            learned = {name: value for name, value in learned.items() if name not in kernels}
        if learned:
            parts.append((list(learned), partial(SGD if rule == "sgd" else Adam, lr=lr)))
        order = [name for names, _ in parts for name in names]
        self._order = [*order, *(name for name in params if name not in order)]
        self._weights = self.flat(params)
        sizes = [params[name][0].numel() for name in self._order]
        views = dict(zip(self._order, self._weights.split(sizes, 1), strict=True))
        self.params: Params = {name: views[name].view(value.shape) for name, value in params.items()}
        self._rules, first = list[tuple[slice, Rule]](), 0
        for names, make in parts:
            columns = slice(first, first + sum(params[name][0].numel() for name in names))
            self._rules.append((columns, make(self._weights[:, columns])))
            first = columns.stop

    @property
    def state(self) -> list[dict[str, Tensor]]:
        """All that a step depends on beside weights and gradients."""
        return [rule.state for _, rule in self._rules]

    def load(self, state: list[dict[str, Tensor]]) -> None:
        for mine, kept in zip(self.state, state, strict=True):
            for name, value in mine.items():
                value.copy_(kept[name])

    def flat(self, values: Params) -> Tensor:
        """Values of the meta-parameters, (R, *shape), as a new tensor (R, N), in the order of the weights."""
        return torch.cat([values[name].reshape(len(values[name]), -1) for name in self._order], 1)

    @torch.no_grad()
    def step(self, grads: Tensor, length: Tensor) -> None:
        """Go the part `length` (R,) of a step against `grads`, (R, N); 0 leaves a replica's weights as they are."""
        length = length.to(grads.dtype).unsqueeze(1)
        for columns, rule in self._rules:
            weights = self._weights[:, columns]
            weights.lerp_(rule.ahead(weights, grads[:, columns]), length)


def _matrix(kernels: Tensor) -> tuple[int, int]:
    """Rows and columns of each replica's kernels as Muon sees them: filters, and 9 * channels in."""
    return kernels.shape[1], kernels[0, 0].numel()
