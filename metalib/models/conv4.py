"""Conv4, the field's network for Omniglot: four 3 x 3 convolutions of 64 filters, batch norm, ReLU; then a linear head.

Vinyals et al. 2016 (https://arxiv.org/abs/1606.04080) with max-pooling; MAML, Reptile and iMAML with strided convolutions.
Batch norm always uses batch statistics. Its scale and shift are weights like any other, which the inner loop adapts (as in
Reptile and iMAML) unless the learner treats them apart (ANIL, MAML++). The convolutions have no bias: the batch norm that
follows would cancel it.

This file is the network itself, for one task and in everyday PyTorch. Learners work on many tasks at once, each with its own
weights; two engines, `wide` and `native`, compute that fast, and `loss` chooses between them.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib.types import Params

LAYERS = 4
EPS = 1e-5  # of batch norm, PyTorch's default


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
    filters: int = Field(default=64, ge=1, le=1024)

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """Logits (B, way) of one task's images (B, 1, H, W) under weights (*shape), normalised by the statistics of all B."""
        for layer in range(1, LAYERS + 1):
            kernel = params[f"conv{layer}.weight"].permute(0, 3, 1, 2)
            x = F.conv2d(x, kernel, stride=2 if self.downsample == "stride" else 1, padding=1)
            x = F.batch_norm(x, None, None, params[f"norm{layer}.weight"], params[f"norm{layer}.bias"], training=True, eps=EPS)
            x = F.relu(x)
            if self.downsample == "maxpool":
                x = F.max_pool2d(x, 2)
        x = x.mean((2, 3)) if self.features == "mean" else x.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x, params["head.weight"], params["head.bias"])

    def init(self, generator: torch.Generator) -> Params:
        """Glorot-uniform kernels as in the code of all the authors, batch norm 1 and 0; float32, on the generator's device."""
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
