"""Conv4, the field's network for Omniglot: four 3 x 3 convolutions of 64 filters, batch norm, ReLU; then a linear head.

Vinyals et al. 2016 (https://arxiv.org/abs/1606.04080) with max-pooling; MAML, Reptile and iMAML with strided convolutions.
Batch norm always uses batch statistics. Its scale and shift are weights like any other, which the inner loop adapts (as in
Reptile and iMAML) unless the learner treats them apart (ANIL, MAML++). The convolutions have no bias: the batch norm behind
each would cancel it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib.models import native, wide
from metalib.types import Params

LAYERS = 4


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Conv4:
    """The network as functions of its weights.

    Weights, for layers l = 1..4: conv<l>.weight (filters, 3, 3, channels in), norm<l>.weight and norm<l>.bias (filters,);
    head.weight (way, features), head.bias (way,).
    """

    way: int
    image_size: int = 28
    downsample: Literal["stride", "maxpool"] = "stride"  # stride-2 convolutions, or stride 1 and 2 x 2 max-pooling
    features: Literal["flatten", "mean"] = "flatten"  # what the head sees of the last maps: every value, or their mean
    head_init: Literal["glorot", "normal", "zero"] = "glorot"  # the head's first weights: Glorot uniform; N(0, 1): MAML's code
    filters: PositiveInt = 64

    def init(self, generator: torch.Generator) -> Params:
        """Glorot-uniform kernels as in all the authors' codes, batch norm 1 and 0; float32, on the generator's device."""
        device = generator.device

        def glorot(*shape: int, fan_in: int, fan_out: int) -> Tensor:
            bound = (6 / (fan_in + fan_out)) ** 0.5
            return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)

        params, c = {}, 1
        for layer in range(1, LAYERS + 1):
            params[f"conv{layer}.weight"] = glorot(self.filters, 3, 3, c, fan_in=9 * c, fan_out=9 * self.filters)
            params[f"norm{layer}.weight"] = torch.ones(self.filters, device=device)
            params[f"norm{layer}.bias"] = torch.zeros(self.filters, device=device)
            c = self.filters
        n = self.filters * (self.last_size**2 if self.features == "flatten" else 1)
        params["head.weight"] = {
            "glorot": lambda: glorot(self.way, n, fan_in=n, fan_out=self.way),
            "normal": lambda: torch.randn(self.way, n, generator=generator, device=device),
            "zero": lambda: torch.zeros(self.way, n, device=device),
        }[self.head_init]()
        params["head.bias"] = torch.zeros(self.way, device=device)
        return params

    @property
    def last_size(self) -> int:
        """Height and width of the last maps: 28 becomes 14, 7, 4, 2 with strides and 14, 7, 3, 1 with pooling."""
        size = self.image_size
        for _ in range(LAYERS):
            size = size // 2 if self.downsample == "maxpool" else (size + 1) // 2
        if size == 0:
            raise ValueError(f"image_size: {self.image_size} is too small to be halved {LAYERS} times; at least 16")
        return size

    def apply(self, params: Params, x: Tensor, statistics_from: int | None = None) -> Tensor:
        """Logits (T, B, way) of images (T, B, 1, H, W) under weights (T, *shape); see `body` and `head`."""
        return self.head(params, self.body(params, x, statistics_from))

    def head(self, params: Params, features: Tensor) -> Tensor:
        """Logits (T, B, way) of features (T, B, F); fewer heads than tasks, (R, way, F), serve T / R tasks in a row each."""
        heads = len(params["head.weight"])
        rows = features.reshape(heads, -1, features.shape[-1])
        logits = torch.baddbmm(params["head.bias"].unsqueeze(1), rows, params["head.weight"].mT)
        return logits.view(*features.shape[:2], -1)

    def body(self, params: Params, x: Tensor, statistics_from: int | None = None) -> Tensor:
        """Features (T, B, F) of images (T, B, 1, H, W).

        Batch norm's statistics come from the first `statistics_from` images of each task, or from all of them (None).
        """
        tasks, images = x.shape[:2]
        known = min(images, statistics_from or images)
        stride = 2 if self.downsample == "stride" else 1
        y = wide.first_layer(
            x, params["conv1.weight"], params["norm1.weight"], params["norm1.bias"], stride, known
        )  # (B, H, W, T * filters), as all the following
        y = self._pool(y)
        for layer in range(2, LAYERS + 1):
            gamma, beta = params[f"norm{layer}.weight"], params[f"norm{layer}.bias"]
            y = wide.Conv.apply(y, params[f"conv{layer}.weight"], stride)
            _, h, w, channels = y.shape
            rows = wide.NormReLU.apply(y.reshape(-1, channels), gamma.flatten(), beta.flatten(), known * h * w)
            y = self._pool(rows.view(y.shape))
        maps = y.unflatten(3, (tasks, self.filters))  # (B, H, W, T, filters)
        if self.features == "mean":
            return maps.mean((1, 2)).transpose(0, 1)
        return maps.permute(3, 0, 1, 2, 4).reshape(tasks, images, -1)

    def _pool(self, y: Tensor) -> Tensor:
        return F.max_pool2d(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) if self.downsample == "maxpool" else y

    @property
    def loss(self) -> "Conv4Loss":
        """The transductive task loss: every set is normalised by its own statistics."""
        return Conv4Loss(self)

    def inductive_loss(self, support: int) -> "Conv4Loss":
        """The task loss that normalises queries by the support set's statistics, so that no query helps another.

        It is given the support set alone (at most `support` images) or support and queries together (tasks.with_support),
        whose first `support` images then only lend their statistics.
        """
        return Conv4Loss(self, support)

    def plain(self, params: Params, x: Tensor) -> Tensor:
        """The network of one task in everyday PyTorch, to read and to test `apply` against.

        Weights (*shape), images (B, 1, H, W) -> logits (B, way), transductive.
        """
        for layer in range(1, LAYERS + 1):
            kernel = params[f"conv{layer}.weight"].permute(0, 3, 1, 2)
            x = F.conv2d(x, kernel, stride=2 if self.downsample == "stride" else 1, padding=1)
            x = F.batch_norm(
                x, None, None, params[f"norm{layer}.weight"], params[f"norm{layer}.bias"], training=True, eps=wide.EPS
            )
            x = F.relu(x)
            if self.downsample == "maxpool":
                x = F.max_pool2d(x, 2)
        x = x.mean((2, 3)) if self.features == "mean" else x.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x, params["head.weight"], params["head.bias"])


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Conv4Loss:
    """Mean cross-entropy of each task, (T,): a SplitLoss."""

    network: Conv4
    support: int | None = None  # images whose statistics serve all others; None: every set has its own

    def __call__(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        if native.serves(self.network, params, x):
            return native.loss(self.network, params, x, y, self.support)
        return self.head(params, self.body(params, x), y)

    def body(self, params: Params, x: Tensor) -> Tensor:
        return self.network.body(params, x, self.support)

    def head(self, params: Params, features: Tensor, y: Tensor) -> Tensor:
        skip = self.support if self.support is not None and features.shape[1] > self.support else 0
        return cross_entropy(self.network.head(params, features[:, skip:]), y[:, skip:])


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Logits (T, B, way) and labels (T, B) -> mean cross-entropy of each task, (T,)."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)
