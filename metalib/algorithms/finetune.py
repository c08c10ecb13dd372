"""Joint pre-training, then fine-tuning: the slides' starting point, "Fine-tuning", and a baseline of Leap and Meta-Dataset.

One classifier for all meta-training classes is trained as any network is; a new task keeps its body, gets a new head, and is
fine-tuned by gradient descent. The meta-gradient is the gradient of the joint cross-entropy, over all classes at once,

    g = d/d theta  mean of  -log softmax(W f(x))_class,      W (classes, features),

over both sets of each task, half and half (`query_loss` is that mean), without any inner loop: "fine-tuning ignores the
process of learning when transferring knowledge". (Leap's own version has one head per alphabet instead of one for all.)
"""

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, SplitLoss, TaskBatch, Watch, need_halves

JOINT = "joint."  # prefix of the joint head, which is a meta-parameter


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FineTune:
    inner_lr: inner.Rate  # of fine-tuning
    inner_steps: NonNegativeInt
    classes: PositiveInt  # rows of the joint head: 4 quarter turns of every character of the data, or more

    def init(self, params: Params) -> Params:
        head = tree.part(params, "head.")
        return params | {JOINT + name: value.new_zeros(self.classes, *value.shape[1:]) for name, value in head.items()}

    def adapt(self, loss: SplitLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile(tree.without(params, JOINT), len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, watch=watch)

    def meta_gradient(self, loss: SplitLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        need_halves("finetune", loss, params)
        if tasks.classes is None:
            raise ValueError(
                "finetune: the tasks do not say which classes their labels stand for, so no joint head can be trained"
            )
        head = tree.map_with(torch.zeros_like, tree.part(params, "head."))
        theta = tree.detach(tree.tile(tree.without(params, JOINT, "head."), len(tasks.support_x)))
        joint = tree.detach(tree.once(tree.part(params, JOINT)))
        shared = {name.removeprefix(JOINT): value for name, value in joint.items()}
        losses = [
            loss.head(shared, loss.body(theta, x), tasks.classes.gather(1, y))
            for x, y in ((tasks.support_x, tasks.support_y), (tasks.query_x, tasks.query_y))
        ]
        joint_loss = (losses[0] + losses[1]) / 2
        grads = tree.grad(joint_loss.sum(), theta | joint)
        each = len(tasks.support_x) / len(joint[JOINT + "head.bias"])  # tasks that share a joint head
        to_joint = tree.mean_tasks(tree.scale(1 / each, {name: grads.pop(name) for name in joint}))
        return MetaGradient(tree.mean_tasks(grads) | to_joint | head, joint_loss.detach())
