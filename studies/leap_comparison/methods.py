"""The methods compared: four meta-learners, multi-headed fine-tuning, and none at all."""

import dataclasses
import math

import torch
from torch import Tensor

from metalib import algorithms, training, tree
from metalib.checkpoint import Checkpoint
from metalib.cuda_graph import Captured
from metalib.models.conv4 import LAYERS, Conv4
from metalib.models.loss import Conv4Loss
from metalib.types import MetaLearner, Params, TaskLoss
from studies.leap_comparison.schema import Comparison
from studies.leap_comparison.tasks import meta_batch

METHODS = ("leap", "reptile", "fomaml", "maml", "finetune", "none")
CHECKPOINTS = 20  # of a meta-training


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
    checkpoint: Checkpoint | None = None,
) -> Params:
    """Initial weights for a new task, (R, *shape), meta-trained on each seed's n alphabets, classes R x (n, way).

    `generators` draw tasks and images, `weights` the weights to start from, which are the same for all methods. A training that
    was stopped goes on from its `checkpoint`. ValueError when the loss is no longer finite.
    """
    starts = [initial(network, generator) for generator in weights]
    params = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    if method == "none":
        return params
    try:
        if method == "finetune":
            return train_jointly(asked, network, params, images, classes, generators, weights, checkpoint)
        outer = training.Outer(
            optimiser="sgd", lr=getattr(asked.outer_lr, method), schedule="constant",
            meta_steps=asked.meta_steps, meta_batch=asked.meta_batch, validations=CHECKPOINTS,
        )  # fmt: skip
        *_, result = training.train(
            learner(method, asked), Conv4Loss(network), starts,
            lambda randoms, _: meta_batch(images, classes, asked, training_steps(method, asked), randoms)[0],
            nothing_is_selected,
            outer, generators=generators, checkpoint=checkpoint,
        )  # fmt: skip
    except training.Diverged as error:
        seeds = ", ".join(str(asked.seeds[replica]) for replica in error.replicas)
        rates = "inner_lr" if method == "finetune" else f"inner_lr or outer_lr.{method}"
        raise ValueError(
            f"{method}, {len(classes[0])} meta-training alphabet(s), seed {seeds}: {error}; lower {rates}"
        ) from None
    assert isinstance(result, training.Result)
    return {name: torch.stack([some[name] for some in result.params]) for name in params}


def nothing_is_selected(_: Params) -> float:
    """The score of all weights: the last ones are tested."""
    return 0.0


def train_jointly(
    asked: Comparison,
    network: Conv4,
    params: Params,
    images: Tensor,
    classes: list[Tensor],
    generators: list[torch.Generator],
    weights: list[torch.Generator],
    checkpoint: Checkpoint | None = None,
) -> Params:
    """Multi-headed fine-tuning: plain SGD on one body, with a head of its own for each of the n alphabets.

    A new task gets the trained body and the head of `params`, which is random.
    """
    heads = [[initial(network, generator) for _ in tasks] for generator, tasks in zip(weights, classes, strict=True)]
    own = {
        name: torch.stack([torch.stack([head[name] for head in some]) for some in heads])  # (R, n, *shape)
        for name in tree.part(params, "head.")
    }
    body = {name: value.clone() for name, value in tree.without(params, "head.").items()}
    joint = Joint(asked, Conv4Loss(network), body | own, images, classes, generators)
    sgd = Captured(joint.sgd, []) if images.device.type == "cuda" else joint.sgd
    for done in range(joint.load(checkpoint) + 1, asked.meta_steps + 1):
        joint.draw()
        for _ in range(asked.meta_batch * asked.inner_steps):
            sgd()
        lost = [replica for replica, value in enumerate(joint.losses.tolist()) if not math.isfinite(value)]
        if lost:
            raise training.Diverged(f"the loss is no longer finite after meta-step {done}", lost)
        if done % max(1, asked.meta_steps // CHECKPOINTS) == 0 or done == asked.meta_steps:
            joint.save(checkpoint, done)
    return body | tree.part(params, "head.")


class Joint:
    """Joint training's SGD: it goes through the images that a meta-step draws for the other methods, shuffled.

    A step of SGD, not a meta-step of many hundreds, is what a GPU records; so the drawn images keep their place in memory.
    """

    def __init__(
        self,
        asked: Comparison,
        loss: TaskLoss,
        params: Params,
        images: Tensor,
        classes: list[Tensor],
        generators: list[torch.Generator],
    ) -> None:
        """`params`, changed in place: the body (R, *shape), and heads (R, n, *shape)."""
        self.asked, self.loss, self.images, self.classes, self.generators = asked, loss, images, classes, generators
        self.params, self.body, self.heads = params, tree.without(params, "head."), tree.part(params, "head.")
        self.first = torch.arange(len(classes), device=images.device) * asked.meta_batch  # of each seed's tasks
        self.losses = torch.zeros(len(classes), device=images.device)  # the last step's
        self.done = torch.zeros(1, dtype=torch.int64, device=images.device)  # steps since the last draw
        self.drawn: tuple[Tensor, ...] = ()

    def draw(self) -> None:
        """Images for a step of SGD on each inner step's batch of `meta_batch` tasks, in an order of its own for each seed."""
        asked = self.asked
        batch, which = meta_batch(self.images, self.classes, asked, asked.inner_steps, self.generators)
        x, y = (part.unflatten(1, (-1, asked.inner_batch)) for part in batch[:2])  # (R * meta_batch, steps, batch, ...)
        count = asked.meta_batch * asked.inner_steps
        orders = [torch.rand(count, generator=g, device=self.images.device).argsort() for g in self.generators]
        drawn = (x, y, which, torch.stack(orders, 1))  # the last: task and step of each batch, (meta_batch * steps, R)
        for old, new in zip(self.drawn, drawn, strict=False):
            old.copy_(new)
        self.drawn = self.drawn or drawn
        self.done.zero_()

    def sgd(self) -> None:
        """The next step. It never waits for the host."""
        x, y, which, order = self.drawn
        place = order.index_select(0, self.done).squeeze(0)
        task, at = self.first + place // self.asked.inner_steps, place % self.asked.inner_steps
        losses = joint_step(self.loss, self.body, self.heads, which[task], x[task, at], y[task, at], self.asked.inner_lr)
        self.losses.copy_(losses)
        self.done.add_(1)

    def save(self, checkpoint: Checkpoint | None, step: int) -> None:
        """Keep the state after this meta-step, where a checkpoint is given."""
        if checkpoint:
            checkpoint.save(step=step, params=self.params, generators=[g.get_state() for g in self.generators])

    def load(self, checkpoint: Checkpoint | None) -> int:
        """Go back to the state that was kept; returns its meta-step, 0 where there is none."""
        state = checkpoint.load(self.images.device) if checkpoint else None
        if checkpoint is None or state is None:
            return 0
        checkpoint.say(f"goes on from meta-step {state['step']}")
        for name, value in self.params.items():
            value.copy_(state["params"][name])
        for generator, kept in zip(self.generators, state["generators"], strict=True):
            generator.set_state(kept.cpu())
        return int(state["step"])


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
