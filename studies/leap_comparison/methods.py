"""The methods compared: four meta-learners, multi-headed fine-tuning, and none at all."""

import dataclasses
import math

import torch
from torch import Tensor

from metalib import algorithms, training, tree
from metalib.models.conv4 import LAYERS, Conv4
from metalib.models.loss import Conv4Loss
from metalib.types import MetaLearner, Params, TaskLoss
from studies.leap_comparison.schema import Comparison
from studies.leap_comparison.tasks import meta_batch

METHODS = ("leap", "reptile", "fomaml", "maml", "finetune", "none")


def make_network(asked: Comparison, image_size: int) -> Conv4:
    return Conv4(way=asked.way, image_size=image_size, downsample=asked.downsample, filters=asked.filters)


def initial(network: Conv4, generator: torch.Generator) -> Params:
    """Initial weights as the authors have them: PyTorch's default, uniform within 1 / sqrt(inputs); batch norm 1 and 0."""
    params = network.init(generator)
    inputs = params["head.weight"].shape[1]
    for name in ("head.weight", "head.bias", *(f"conv{layer}.weight" for layer in range(1, LAYERS + 1))):
        bound = (inputs if name == "head.bias" else params[name][0].numel()) ** -0.5
        params[name].uniform_(-bound, bound, generator=generator)
    return params


def learner(method: str, asked: Comparison) -> MetaLearner:
    """Leap, Reptile, FOMAML or MAML; every inner step has a batch of its own."""
    own = {"leap": dataclasses.asdict(asked.leap), "reptile": {"inner_optimiser": "sgd"}}
    common = {"inner_lr": asked.inner_lr, "inner_steps": training_steps(method, asked), "inner_batch": asked.inner_batch}
    return algorithms.build(method, common | own.get(method, {}))


def training_steps(method: str, asked: Comparison) -> int:
    """Inner steps in meta-training."""
    return asked.maml_steps if method == "maml" else asked.inner_steps


def meta_train(
    method: str,
    asked: Comparison,
    network: Conv4,
    images: Tensor,
    classes: list[Tensor],
    generators: list[torch.Generator],
    weights: list[torch.Generator],
) -> Params:
    """Initial weights for a new task, (R, *shape), meta-trained on each seed's n alphabets, classes R x (n, way).

    `generators` draw tasks and images, `weights` the weights to start from, which are the same for all methods. ValueError when
    the loss is no longer finite.
    """
    starts = [initial(network, generator) for generator in weights]
    params = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    if method == "none":
        return params
    try:
        if method == "finetune":
            return train_jointly(asked, network, params, images, classes, generators, weights)
        outer = training.Outer(
            optimiser="sgd", lr=getattr(asked.outer_lr, method), schedule="constant",
            meta_steps=asked.meta_steps, meta_batch=asked.meta_batch, validations=1,
        )  # fmt: skip
        *_, result = training.train(
            learner(method, asked), Conv4Loss(network), starts,
            lambda randoms, _: meta_batch(images, classes, asked, training_steps(method, asked), randoms)[0],
            lambda _: 0.0,  # no model is selected: the last weights are tested
            outer, generators=generators,
        )  # fmt: skip
    except training.Diverged as error:
        seeds = ", ".join(str(asked.seeds[replica]) for replica in error.replicas)
        rates = "inner_lr" if method == "finetune" else f"inner_lr or outer_lr.{method}"
        raise ValueError(
            f"{method}, {len(classes[0])} meta-training alphabet(s), seed {seeds}: {error}; lower {rates}"
        ) from None
    assert isinstance(result, training.Result)
    return {name: torch.stack([some[name] for some in result.params]) for name in params}


def train_jointly(
    asked: Comparison,
    network: Conv4,
    params: Params,
    images: Tensor,
    classes: list[Tensor],
    generators: list[torch.Generator],
    weights: list[torch.Generator],
) -> Params:
    """Multi-headed fine-tuning: plain SGD on one body, with a head of its own for each of the n alphabets.

    A meta-step draws the images that it draws for the other methods, and takes a step of SGD on each batch of all its tasks, in
    random order. A new task gets the trained body and the head of `params`, which is random.
    """
    loss = Conv4Loss(network)
    heads = [[initial(network, generator) for _ in tasks] for generator, tasks in zip(weights, classes, strict=True)]
    own = {
        name: torch.stack([torch.stack([head[name] for head in some]) for some in heads])  # (R, n, *shape)
        for name in tree.part(params, "head.")
    }
    body = {name: value.clone() for name, value in tree.without(params, "head.").items()}
    for step in range(asked.meta_steps):
        batch, which = meta_batch(images, classes, asked, asked.inner_steps, generators)
        x, y = (part.unflatten(1, (-1, asked.inner_batch)) for part in batch[:2])  # (R * meta_batch, steps, batch, ...)
        # task and step of each batch, in a different order for each seed
        order = torch.stack(
            [torch.rand(asked.meta_batch * asked.inner_steps, generator=g, device=images.device).argsort() for g in generators],
            1,
        )  # (meta_batch * steps, R)
        first = torch.arange(len(classes), device=images.device) * asked.meta_batch  # of each seed's tasks
        for place in order:
            task, at = first + place // asked.inner_steps, place % asked.inner_steps
            losses = joint_step(loss, body, own, which[task], x[task, at], y[task, at], asked.inner_lr)
        lost = [replica for replica, value in enumerate(losses.tolist()) if not math.isfinite(value)]
        if lost:
            raise training.Diverged(f"the loss is no longer finite after meta-step {step + 1}", lost)
    return body | tree.part(params, "head.")


def joint_step(loss: TaskLoss, body: Params, heads: Params, which: Tensor, x: Tensor, y: Tensor, lr: float) -> Tensor:
    """One step of SGD, in place, on a batch of one alphabet for each of R seeds; returns its losses (R,).

    body (R, *shape), heads (R, n, *shape), which (R,): the alphabet of each batch, x (R, B, ...), y (R, B).
    """
    rows = torch.arange(len(which), device=which.device)
    weights = tree.detach(body | {name: value[rows, which] for name, value in heads.items()})
    losses = loss(weights, x, y)
    grads = tree.grad(losses.sum(), weights)
    for name, value in body.items():
        value.sub_(grads[name], alpha=lr)
    for name, value in heads.items():
        value[rows, which] -= lr * grads[name]
    return losses.detach()
