"""The work that is timed: one meta-gradient of a learner on random images, without sampling or an outer step.

W1 to W9 are in the settings of the publications; a second table has each learner once, all in one setting. A learner without
an item is not timed, and `speed` says so.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metalib import algorithms
from metalib.models.conv4 import Conv4
from metalib.types import MetaLearner, Params, TaskBatch

INK = 0.1  # about the part of an Omniglot image that is ink
CHARACTER_CLASSES = 6492  # 4 quarter turns of 1,623 characters


@dataclass(frozen=True)
class Item:
    learner: str  # a file of metalib/algorithms
    way: int
    shot: int  # support images per class
    query: int  # query images per class
    tasks: int
    hyper: dict[str, Any]  # of the learner

    def __str__(self) -> str:
        steps, images = self.hyper["inner_steps"], f"{self.shot} + {self.query}"
        return f"{self.learner}: {self.tasks} tasks of {self.way} classes, {images} images of each; inner steps: {steps}"

    def make_learner(self) -> MetaLearner:
        return algorithms.build(self.learner, self.hyper)

    def network(self) -> Conv4:
        """MAML's head starts with weights of unit variance, all others with Glorot's."""
        normal = self.learner in ("maml", "fomaml")
        return Conv4(way=self.way, features="mean", head_init="normal" if normal else "glorot")

    def data(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Params, TaskBatch]:
        """Meta-parameters and tasks, the same in every call, on every device and in either type."""
        random = torch.Generator().manual_seed(0)
        weights = {name: value.to(device, dtype) for name, value in self.network().init(random).items()}

        def images(per_class: int) -> tuple[Tensor, Tensor]:
            x = torch.rand(self.tasks, per_class * self.way, 1, 28, 28, generator=random) < INK
            y = torch.arange(self.way).repeat(per_class).expand(self.tasks, -1)  # shot by shot
            return x.to(device, dtype), y.to(device)

        classes = torch.rand(self.tasks, CHARACTER_CLASSES, generator=random).topk(self.way).indices.to(device)
        return self.make_learner().init(weights), TaskBatch(*images(self.shot), *images(self.query), classes)


def _descent(steps: int, lr: float = 0.4, **more: Any) -> dict[str, Any]:
    return {"inner_lr": lr, "inner_steps": steps, **more}


def _implicit(steps: int) -> dict[str, Any]:
    """As published: no damping, 5 steps of CG, lambda 2."""
    return _descent(
        steps, 0.1, inner_optimiser="sgd", proximal="each", lam=2.0, solver="cg", cg_steps=5, damping=0.0, lam_damping=0.0
    )


def _leap(steps: int, lr: float, batch: int) -> dict[str, Any]:
    return _descent(steps, lr, inner_batch=batch, norm=True, loss=True, stabiliser=True)


def _reptile(steps: int, lr: float, **more: Any) -> dict[str, Any]:
    return _descent(steps, lr, inner_batch=10, **more)


PAPERS = {
    "W1": Item("maml", way=5, shot=1, query=1, tasks=32, hyper=_descent(1)),
    "W1b": Item("maml", way=5, shot=1, query=15, tasks=32, hyper=_descent(1)),
    "W2": Item("maml", way=5, shot=5, query=5, tasks=32, hyper=_descent(1)),
    "W3": Item("maml", way=20, shot=1, query=1, tasks=16, hyper=_descent(5)),
    "W4": Item("maml", way=20, shot=5, query=5, tasks=16, hyper=_descent(5)),
    "W5": Item("fomaml", way=20, shot=1, query=1, tasks=16, hyper=_descent(5)),
    "W6": Item("reptile", way=5, shot=10, query=1, tasks=5, hyper=_reptile(5, 0.001, inner_optimiser="adam", moments="reset")),
    "W7": Item("imaml", way=5, shot=1, query=15, tasks=32, hyper=_implicit(16)),
    "W8": Item("imaml", way=20, shot=5, query=5, tasks=16, hyper=_implicit(25)),
    "W9": Item("leap", way=20, shot=15, query=1, tasks=20, hyper=_leap(100, 0.1, batch=20)),
}

# 5-way 1-shot, 16 tasks, inner steps about those of budget `quick`; Reptile and Leap have their ten images of each class
LEARNERS = {
    item.learner: item
    for item in (
        Item("anil", 5, 1, 1, 16, _descent(3)),
        Item("finetune", 5, 1, 1, 16, _descent(10, 0.1, classes=CHARACTER_CLASSES)),
        Item("fomaml", 5, 1, 1, 16, _descent(5, 0.1)),
        Item("imaml", 5, 1, 1, 16, _implicit(5)),
        Item("imaml_hf", 5, 1, 1, 16, _descent(2, 1.0, lam=2.0, cg_steps=2, damping=1.0, lam_damping=10.0, halvings=1)),
        Item("leap", 5, 10, 1, 16, _leap(5, 0.2, batch=10)),
        Item("maml", 5, 1, 1, 16, _descent(1)),
        Item("maml_plus_plus", 5, 1, 1, 16, _descent(2, msl=0.1)),
        Item("maml_truncated", 5, 1, 1, 16, _descent(4, 0.15, backprop_steps=2)),
        Item("meta_sgd", 5, 1, 1, 16, _descent(1)),
        Item("reptile", 5, 10, 1, 16, _reptile(5, 0.2, inner_optimiser="sgd")),
        Item("scratch", 5, 1, 1, 16, _descent(10)),
    )
}

ITEMS = PAPERS | LEARNERS


def find(names: str) -> dict[str, Item]:
    """The items of comma-separated names, or of "all"; ValueError for an unknown name."""
    wanted = list(ITEMS) if names == "all" else names.split(",")
    if unknown := [name for name in wanted if name not in ITEMS]:
        raise ValueError(f"--items: {', '.join(unknown)} is not among {', '.join(ITEMS)}")
    return {name: ITEMS[name] for name in wanted}
