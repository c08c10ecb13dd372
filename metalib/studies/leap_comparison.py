"""Leap's comparison on Omniglot: alphabets as tasks, long adaptation, and how learning depends on the number of alphabets.

Flennerhag et al., ICLR 2019, https://arxiv.org/abs/1812.01054, section 4.1 and figure 3; github.com/amzn/metalearn-leap. A task
is to tell `way` characters of one alphabet apart, by 100 steps of SGD on small batches, every image of which is turned, moved
and scaled at random when it is drawn. Meta-training has n alphabets; others are held out. A method is judged by how fast a
held-out alphabet is learned from its initial weights: by the area under the learning curve.

R seeds are trained at once, as replicas (metalib/tree.py): meta-parameters (R, *shape), tasks of the first seed first.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import algorithms, inner, training, tree
from metalib.data.omniglot import DRAWERS, Characters
from metalib.models.conv4 import LAYERS, Conv4
from metalib.types import MetaGradient, MetaLearner, Params, TaskBatch, TaskLoss, Watch

METHODS = ("leap", "reptile", "fomaml", "maml", "finetune", "none")
STRICT = ConfigDict(extra="forbid")


# ------------------------------------------------------------------------------------------------ protocol


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Augmentation:
    """Each image is turned, scaled and moved, by amounts drawn from uniform distributions."""

    degrees: float = Field(ge=0, le=360)  # turned by 0 to so many degrees
    shift: float = Field(ge=0, lt=1)  # moved by at most this part of the size, along and across
    smallest: PositiveFloat  # scaled by a factor from here
    largest: PositiveFloat  # to here


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OuterRates:
    """Rates of the outer SGD."""

    leap: PositiveFloat
    reptile: PositiveFloat
    fomaml: PositiveFloat
    maml: PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LeapChoices:
    """Those of metalib/algorithms/leap.py that are choices of the method."""

    norm: bool
    loss: bool
    stabiliser: bool


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Protocol:
    """Everything the comparison is made with."""

    seeds: list[NonNegativeInt] = Field(min_length=1)  # of alphabets, characters, initial weights, draws
    alphabets: list[PositiveInt] = Field(min_length=1)  # n, in meta-training; ascending
    test: PositiveInt  # alphabets held out
    way: int = Field(ge=2)  # characters of an alphabet; alphabets with fewer are left out
    held_out: int = Field(ge=1, lt=DRAWERS)  # images of a character that are never trained on
    augmentation: Augmentation
    downsample: Literal["stride", "maxpool"]
    filters: PositiveInt
    batch: PositiveInt  # images in an inner step
    inner_steps: PositiveInt  # in a test task, and in meta-training of all but MAML
    maml_steps: PositiveInt  # inner steps of MAML in meta-training
    inner_lr: PositiveFloat
    outer_lr: OuterRates
    leap: LeapChoices
    meta_steps: PositiveInt
    meta_batch: PositiveInt  # tasks in a meta-step
    every: PositiveInt  # inner steps from one look at the held-out images to the next
    window: PositiveInt  # of the moving average of learning curves

    @model_validator(mode="after")
    def _fits(self) -> "Protocol":
        if sorted(set(self.alphabets)) != self.alphabets or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"alphabets must ascend and seeds differ, got {self.alphabets} and {self.seeds}")
        if self.inner_steps % self.every or self.window > self.inner_steps:
            raise ValueError(f"inner_steps {self.inner_steps} must be a multiple of every {self.every}, and at least window")
        if self.augmentation.smallest > self.augmentation.largest:
            raise ValueError("augmentation: smallest is larger than largest")
        return self


# ------------------------------------------------------------------------------------------------ data


def tasks_in_order(data: Characters, protocol: Protocol, generator: torch.Generator) -> Tensor:
    """Every alphabet with enough characters, in random order, as `way` random characters of it: indices (alphabets, way).

    The first `test` are the held-out ones, for every n; those behind them are for meta-training, the first n of them at n.
    ValueError when there are too few.
    """
    names = list(zip(data.background.tolist(), data.alphabets.tolist(), strict=True))
    members = [[i for i, name in enumerate(names) if name == alphabet] for alphabet in sorted(set(names))]
    members = [indices for indices in members if len(indices) >= protocol.way]
    wanted = protocol.test + max(protocol.alphabets)
    if wanted > len(members):
        raise ValueError(
            f"{wanted} alphabets of at least {protocol.way} characters are wanted, for the test and for meta-training, "
            f"but there are {len(members)}"
        )
    order = torch.randperm(len(members), generator=generator).tolist()
    chosen = [torch.randperm(len(members[a]), generator=generator)[: protocol.way] for a in order]
    return torch.stack([torch.tensor(members[a])[which] for a, which in zip(order, chosen, strict=True)])


def draw(
    images: Tensor, classes: Tensor, drawers: range, count: int, augmentation: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` images of each task in random order, each augmented afresh: x (T, count, 1, H, W) in [0, 1], y (T, count).

    images (N, drawers, H, W) uint8, classes (T, way). A task's images come equally often, or one time more or less
    (authors' code: a random order of `count` numbers, modulo the number of images); fewer than there are: without repetition.
    """
    tasks, way = classes.shape
    size = way * len(drawers)
    order = torch.rand(tasks, max(count, size), generator=generator, device=images.device).argsort(1)[:, :count] % size
    y = order % way
    pixels = images[classes.gather(1, y), drawers.start + order // way]
    return augment(pixels.flatten(0, 1).float().div_(255), augmentation, generator).view(*y.shape, 1, *images.shape[-2:]), y


def augment(x: Tensor, by: Augmentation, generator: torch.Generator) -> Tensor:
    """Images (B, H, W), each turned, scaled and moved by amounts of its own."""
    turn, factor, right, down = torch.rand(4, len(x), generator=generator, device=x.device)
    return warp(
        x,
        turn * by.degrees * torch.pi / 180,
        by.smallest + factor * (by.largest - by.smallest),
        by.shift * (2 * right - 1),
        by.shift * (2 * down - 1),
    )


def warp(x: Tensor, angle: Tensor, factor: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Images (B, H, W), turned clockwise by an angle (radians) and scaled about their centres, then moved by parts of the size.

    A point p of the result is looked up where it came from, (p - shift) turned back and divided by the factor, bilinearly;
    outside of the image is paper, 0.
    """
    right, down = 2 * right, 2 * down  # in affine_grid's coordinates an image is 2 wide, from -1 to 1
    cos, sin = angle.cos() / factor, angle.sin() / factor
    back = torch.stack([cos, sin, -cos * right - sin * down, -sin, cos, sin * right - cos * down], 1).view(-1, 2, 3)
    grid = F.affine_grid(back, [len(x), 1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x.unsqueeze(1), grid, align_corners=False).squeeze(1)


def meta_batch(
    images: Tensor, classes: list[Tensor], protocol: Protocol, steps: int, generators: list[torch.Generator]
) -> tuple[TaskBatch, Tensor]:
    """`meta_batch` tasks of each seed out of its n, classes R x (n, way); with them, which of the n each is, (R * meta_batch,).

    Tasks are drawn in random order, and once more from the start where n is smaller. The support set is the images of `steps`
    inner steps in a row, the query set one more batch, drawn in the same way from the same training images.
    """
    parts, which = [], []
    for tasks, generator in zip(classes, generators, strict=True):
        rounds = -(-protocol.meta_batch // len(tasks))
        shuffled = torch.rand(rounds, len(tasks), generator=generator, device=tasks.device).argsort(1)
        which.append(shuffled.flatten()[: protocol.meta_batch])
        trained = range(protocol.held_out, images.shape[1])
        count = (steps + 1) * protocol.batch
        parts.append(draw(images, tasks[which[-1]], trained, count, protocol.augmentation, generator))
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    end = steps * protocol.batch
    return TaskBatch(x[:, :end], y[:, :end], x[:, end:], y[:, end:]), torch.cat(which)


def held_out_tasks(images: Tensor, classes: list[Tensor], protocol: Protocol, generators: list[torch.Generator]) -> TaskBatch:
    """The held-out alphabets of each seed, R x (test, way): images of all inner steps, and as queries the held-out images."""
    parts = []
    for tasks, generator in zip(classes, generators, strict=True):
        trained, held_out = range(protocol.held_out, images.shape[1]), range(protocol.held_out)
        steps = draw(images, tasks, trained, protocol.inner_steps * protocol.batch, protocol.augmentation, generator)
        queries = draw(images, tasks, held_out, protocol.way * protocol.held_out, protocol.augmentation, generator)
        parts.append((*steps, *queries))
    return TaskBatch(*(torch.cat(part) for part in zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------ meta-training


def make_network(protocol: Protocol, image_size: int) -> Conv4:
    return Conv4(way=protocol.way, image_size=image_size, downsample=protocol.downsample, filters=protocol.filters)


def initial(network: Conv4, generator: torch.Generator) -> Params:
    """Initial weights as the authors': PyTorch's default, uniform within 1 / sqrt(inputs); batch norm 1 and 0."""
    params = network.init(generator)
    inputs = params["head.weight"].shape[1]
    for name in ("head.weight", "head.bias", *(f"conv{layer}.weight" for layer in range(1, LAYERS + 1))):
        bound = (inputs if name == "head.bias" else params[name][0].numel()) ** -0.5
        params[name].uniform_(-bound, bound, generator=generator)
    return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchFOMAML:
    """metalib/algorithms/fomaml.py with a batch of its own for every inner step, as all methods have here."""

    inner_lr: float
    inner_steps: int
    inner_batch: int

    def init(self, params: Params) -> Params:
        return params

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(params, len(x))
        return inner.sgd(
            loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, watch=watch
        )  # fmt: skip

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        phi = self.adapt(loss, params, tasks.support_x, tasks.support_y)
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.mean_tasks(tree.grad(query_loss.sum(), phi)), query_loss.detach())


class BatchMAML(BatchFOMAML):
    """metalib/algorithms/maml.py, likewise."""

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        theta = tree.detach(tree.tile(params, len(tasks.support_x)))
        phi = inner.sgd(
            loss, theta, tasks.support_x, tasks.support_y,
            lr=self.inner_lr, steps=self.inner_steps, batch=self.inner_batch, create_graph=True,
        )  # fmt: skip
        query_loss = loss(phi, tasks.query_x, tasks.query_y)
        return MetaGradient(tree.mean_tasks(tree.grad(query_loss.sum(), theta)), query_loss.detach())


def learner(method: str, protocol: Protocol) -> MetaLearner:
    """Leap, Reptile, FOMAML or MAML as the protocol has it."""
    steps = protocol.maml_steps if method == "maml" else protocol.inner_steps
    lr, batch = protocol.inner_lr, protocol.batch
    common = {"inner_lr": lr, "inner_steps": steps, "inner_batch": batch}
    if method == "leap":
        return algorithms.build("leap", common | dataclasses.asdict(protocol.leap))
    if method == "reptile":
        return algorithms.build("reptile", common | {"inner_optimiser": "sgd", "moments": "reset"})
    return (BatchFOMAML if method == "fomaml" else BatchMAML)(inner_lr=lr, inner_steps=steps, inner_batch=batch)


def meta_train(
    method: str,
    protocol: Protocol,
    network: Conv4,
    images: Tensor,
    classes: list[Tensor],
    generators: list[torch.Generator],
    weights: list[torch.Generator],
) -> Params:
    """Initial weights for a new task, (R, *shape), after meta-training on each seed's n alphabets, classes R x (n, way).

    `generators` are of the draws, `weights` of the initial weights: the same for all methods. ValueError when a loss is lost.
    """
    starts = [initial(network, generator) for generator in weights]
    params = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    if method == "none":
        return params
    try:
        if method == "finetune":
            return train_jointly(protocol, network, params, images, classes, generators, weights)
        outer = training.Outer(
            optimiser="sgd", lr=getattr(protocol.outer_lr, method), schedule="constant",
            meta_steps=protocol.meta_steps, meta_batch=protocol.meta_batch, validate_every=protocol.meta_steps,
        )  # fmt: skip
        steps = protocol.maml_steps if method == "maml" else protocol.inner_steps
        *_, result = training.train(
            learner(method, protocol), network.loss, starts,
            lambda randoms, _: meta_batch(images, classes, protocol, steps, randoms)[0],
            lambda _: 0.0,  # nothing is chosen by validation
            outer, generators=generators,
        )  # fmt: skip
    except training.Diverged as error:
        seeds = ", ".join(str(protocol.seeds[replica]) for replica in error.replicas)
        raise ValueError(f"{method}, n = {len(classes[0])}, seed {seeds}: {error}; lower inner_lr or its outer_lr") from None
    assert isinstance(result, training.Result)
    return {name: torch.stack([some[name] for some in result.params]) for name in params}


def train_jointly(
    protocol: Protocol,
    network: Conv4,
    params: Params,
    images: Tensor,
    classes: list[Tensor],
    generators: list[torch.Generator],
    weights: list[torch.Generator],
) -> Params:
    """Multi-headed pre-training: one body, and for each of the n alphabets a head of its own, by plain SGD.

    A meta-step has the images that the other methods' meta-steps have: their batches, of all its tasks, in random order, and a
    step of SGD for each. A new task gets the trained body, and the head of `params`, which is random.
    """
    heads = [[initial(network, generator) for _ in tasks] for generator, tasks in zip(weights, classes, strict=True)]
    own = {
        name: torch.stack([torch.stack([head[name] for head in some]) for some in heads])  # (R, n, *shape)
        for name in params
        if name.startswith("head.")
    }
    body = {name: value.clone() for name, value in params.items() if name not in own}
    for step in range(protocol.meta_steps):
        batch, which = meta_batch(images, classes, protocol, protocol.inner_steps, generators)
        x, y = (part.unflatten(1, (-1, protocol.batch)) for part in batch[:2])  # (R * meta_batch, steps, batch, ...)
        # task and step of each batch, in an order of each seed's own
        order = torch.stack(
            [
                torch.rand(protocol.meta_batch * protocol.inner_steps, generator=g, device=images.device).argsort()
                for g in generators
            ],
            1,
        )  # (meta_batch * steps, R)
        first = torch.arange(len(classes), device=images.device) * protocol.meta_batch  # of each seed's tasks
        for place in order:
            task, at = first + place // protocol.inner_steps, place % protocol.inner_steps
            loss = joint_step(network.loss, body, own, which[task], x[task, at], y[task, at], protocol.inner_lr)
        lost = [replica for replica, value in enumerate(loss.tolist()) if not math.isfinite(value)]
        if lost:
            raise training.Diverged(f"the loss is no longer finite after meta-step {step + 1}", lost)
    return body | {name: params[name] for name in own}


def joint_step(loss: TaskLoss, body: Params, heads: Params, which: Tensor, x: Tensor, y: Tensor, lr: float) -> Tensor:
    """One step of SGD, in place, on a batch of one alphabet for each of R seeds; returns its losses (R,).

    body (R, *shape), heads (R, n, *shape), `which` (R,) of the n heads the batch is for, x (R, B, ...), y (R, B).
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


# ------------------------------------------------------------------------------------------------ learning curves


class Curves(NamedTuple):
    """Of test tasks, each (points, R, tasks); errors are parts of 1."""

    loss: Tensor  # on the batch of inner step 0, 1, ..., before its update
    error: Tensor
    held_out_loss: Tensor  # on the held-out images, after 0, `every`, ..., `inner_steps` steps
    held_out_error: Tensor


@torch.no_grad()
def evaluate(protocol: Protocol, network: Conv4, params: Params, tasks: TaskBatch) -> Curves:
    """Learn the test tasks, the same number of each seed, from meta-parameters (R, *shape), by SGD whatever the method was.

    Batch norm has the statistics of the images at hand: of the batch of a step, of all held-out images of a task.
    """
    seen = list[tuple[Tensor, Tensor]]()
    held_out = list[tuple[Tensor, Tensor]]()

    def measure(weights: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = network.apply(weights, x)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        return losses.mean(1), (logits.argmax(-1) != y).float().mean(1)

    @torch.no_grad()
    def watch(weights: Params) -> None:
        step = len(seen)
        if step % protocol.every == 0:
            held_out.append(measure(weights, tasks.query_x, tasks.query_y))
        seen.append(measure(weights, *inner.minibatch(tasks.support_x, tasks.support_y, protocol.batch, step)))

    count = len(next(iter(params.values())))
    with tree.replicas(count), torch.enable_grad():
        inner.sgd(
            network.loss, tree.tile(params, len(tasks.support_x)), tasks.support_x, tasks.support_y,
            lr=protocol.inner_lr, steps=protocol.inner_steps, batch=protocol.batch, watch=watch,
        )  # fmt: skip
    seen.pop()  # after the last step there is no batch to come
    return Curves(
        *(torch.stack(part).unflatten(1, (count, -1)) for pairs in (seen, held_out) for part in zip(*pairs, strict=True))
    )


def auc(values: Tensor, every: int, steps: int) -> Tensor:
    """Area under curves (points, ...), a point for every `every` steps, over the number of steps: (...).

    With a point for each of T steps that is the authors' sum of trapezoids over T (utils.py), (T - 1) / T for a constant 1.
    """
    return torch.trapezoid(values, dx=every, dim=0) / steps


def smooth(values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation within a moving window of curves (points,), each (points - window + 1,)."""
    windows = values.unfold(0, window, 1)
    return windows.mean(-1), windows.std(-1, unbiased=False)
