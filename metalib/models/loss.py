"""Conv4's task loss, computed by whichever engine can: compiled code (native) on the CPU, else PyTorch's operators (wide).

METALIB_ENGINE chooses: auto (native where it can serve, else wide), native (an error where it cannot) or wide.
"""

import os

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib.models import native, wide
from metalib.models.conv4 import Conv4
from metalib.types import Params


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Conv4Loss:
    """Mean cross-entropy of each task, (T,): a SplitLoss.

    Transductive without `support`: every set of images is normalised by its own statistics. Inductive with it: queries are
    normalised by the support set's statistics, so that no query helps another. An inductive loss is given the support set
    alone (at most `support` images), or support and queries together (data.tasks.with_support); the first `support` images
    then only lend their statistics.
    """

    network: Conv4
    support: int | None = None  # images in a support set

    def __call__(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        if _native(self.network, params, x):
            return native.loss(self.network, params, x, y, self.support)
        return self.head(params, wide.body(self.network, params, x, self.support), y)

    def body(self, params: Params, x: Tensor) -> Tensor:
        """Features (T, B, F); a second derivative needs METALIB_ENGINE=wide."""
        if _native(self.network, params, x):
            return native.features(self.network, params, x, self.support)
        return wide.body(self.network, params, x, self.support)

    def head(self, params: Params, features: Tensor, y: Tensor) -> Tensor:
        skip = self.support if self.support is not None and features.shape[1] > self.support else 0
        return cross_entropy(wide.head(params, features[:, skip:]), y[:, skip:])


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Logits (T, B, way) and labels (T, B) -> mean cross-entropy of each task, (T,)."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def engine(network: Conv4, device: torch.device) -> str:
    """Which engine computes task losses in float32 on this device: native or wide."""
    size = network.image_size
    weights = network.init(torch.Generator(device))
    return "native" if _native(network, weights, torch.zeros(1, 1, 1, size, size, device=device)) else "wide"


def _native(network: Conv4, params: Params, x: Tensor) -> bool:
    """Whether the compiled code is to compute this loss; ValueError where METALIB_ENGINE asks for what cannot be."""
    asked = os.environ.get("METALIB_ENGINE") or "auto"
    if asked not in ("auto", "native", "wide"):
        raise ValueError(f"METALIB_ENGINE: {asked!r} is not one of auto, native, wide")
    if asked == "native" and (lacks := native.lacks(network, params, x)):
        raise ValueError(f"METALIB_ENGINE: native does not cover {lacks}; use auto or wide")
    return asked == "native" or (asked == "auto" and native.serves(network, params, x))
