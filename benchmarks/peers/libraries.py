"""Libraries that take a module: learn2learn, higher, TorchOpt."""

import functools
import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.network import Call, tasks_of, to_ours, to_theirs
from benchmarks.work import Item
from metalib.types import Params, TaskBatch


def module_of(item: Item, params: Params) -> nn.Module:
    """The network as the module a user of these libraries would write; its weights have our names."""
    layers, channels = OrderedDict[str, nn.Module](), 1
    for layer in (1, 2, 3, 4):
        layers[f"conv{layer}"] = nn.Conv2d(channels, 64, 3, stride=2, padding=1, bias=False)
        layers[f"norm{layer}"] = nn.BatchNorm2d(64, track_running_stats=False)
        layers[f"relu{layer}"] = nn.ReLU()
        channels = 64
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(64, item.way)}
    module = nn.Sequential(layers)
    weights = to_theirs(params)
    module.to(next(iter(weights.values())))
    module.load_state_dict(weights)
    return module


def take_gradient(weights: Mapping[str, Tensor]) -> Params:
    """The gradient that backward() left on the weights, which then have none."""
    grads = {name: value.grad for name, value in weights.items() if value.grad is not None}
    for value in weights.values():
        value.grad = None
    return to_ours(grads)


def learn2learn(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    library = learn2learn_maml()
    if item.learner not in ("maml", "fomaml"):
        return None
    module, tasks = module_of(item, params), tasks_of(batch)
    weights = dict(module.named_parameters())
    learner = library.MAML(module, lr=item.hyper["inner_lr"], first_order=item.learner == "fomaml")

    def call() -> Params:
        for task in tasks:
            clone = learner.clone()
            for _ in range(item.hyper["inner_steps"]):
                clone.adapt(F.cross_entropy(clone(task.x), task.y))
            (F.cross_entropy(clone(task.query_x), task.query_y) / len(tasks)).backward()
        return take_gradient(weights)

    return call


@functools.cache
def learn2learn_maml() -> ModuleType:
    """Its module algorithms.maml, from a checkout where LEARN2LEARN names one.

    Two empty packages stand for the checkout's own: their __init__ import all of the library and of what it depends on.
    """
    if folder := os.environ.get("LEARN2LEARN"):
        for name in ("learn2learn", "learn2learn.algorithms"):
            stub = ModuleType(name)
            stub.__path__ = [str(Path(folder, *name.split(".")))]
            sys.modules[name] = stub
    return importlib.import_module("learn2learn.algorithms.maml")


def higher(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    library = importlib.import_module("higher")
    if item.learner not in ("maml", "fomaml"):
        return None
    module, tasks = module_of(item, params), tasks_of(batch)
    weights = dict(module.named_parameters())
    inner = torch.optim.SGD(weights.values(), lr=item.hyper["inner_lr"])
    exact = item.learner == "maml"

    def call() -> Params:
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for task in tasks:
            with library.innerloop_ctx(module, inner, copy_initial_weights=False, track_higher_grads=exact) as (net, step):
                for _ in range(item.hyper["inner_steps"]):
                    step.step(F.cross_entropy(net(task.x), task.y))
                loss = F.cross_entropy(net(task.query_x), task.query_y)
                at = list(net.parameters(time=0 if exact else -1))
                for name, g in zip(weights, torch.autograd.grad(loss, at), strict=True):
                    total[name].add_(g, alpha=1 / len(tasks))
        return to_ours(total)

    return call


def torchopt(item: Item, params: Params, batch: TaskBatch) -> Call | None:
    """It has no first-order mode."""
    library = importlib.import_module("torchopt")
    if item.learner != "maml":
        return None
    module, tasks = module_of(item, params), tasks_of(batch)
    weights = dict(module.named_parameters())
    inner = library.MetaSGD(module, lr=item.hyper["inner_lr"])
    start, fresh = library.extract_state_dict(module, by="reference"), library.extract_state_dict(inner)

    def call() -> Params:
        for task in tasks:
            for _ in range(item.hyper["inner_steps"]):
                inner.step(F.cross_entropy(module(task.x), task.y))
            (F.cross_entropy(module(task.query_x), task.query_y) / len(tasks)).backward()
            library.recover_state_dict(module, start)
            library.recover_state_dict(inner, fresh)
        return take_gradient(weights)

    return call
