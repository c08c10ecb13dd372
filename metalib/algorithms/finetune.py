"""Joint pre-training, then fine-tuning: the slides' starting point, "Fine-tuning", and a baseline of Leap and Meta-Dataset.

One classifier for all meta-training classes is trained as any network is; a new task keeps its body, gets a new head, and is
fine-tuned by gradient descent. The meta-gradient is the gradient of the joint cross-entropy, over all classes at once,

    g = d/d theta  mean over images of  -log softmax(W f(x))_class,      W (classes, features),

on both sets of each task, without any inner loop: "fine-tuning ignores the process of learning when transferring knowledge".
(Leap's own version has one head per alphabet instead of one for all.)
"""

from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib import inner, tree
from metalib.types import MetaGradient, Params, TaskBatch, TaskLoss, Watch

JOINT = "joint."  # prefix of the joint head, which is a meta-parameter


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FineTune:
    inner_lr: PositiveFloat  # of fine-tuning
    inner_steps: NonNegativeInt
    classes: PositiveInt  # rows of the joint head: 4 quarter turns of every character of the data, or more

    def init(self, params: Params) -> Params:
        head = {n: v.new_zeros(self.classes, *v.shape[1:]) for n, v in params.items() if n.startswith("head.")}
        return params | {JOINT + name: value for name, value in head.items()}

    def adapt(self, loss: TaskLoss, params: Params, x: Tensor, y: Tensor, watch: Watch | None = None) -> Params:
        theta = tree.tile({n: v for n, v in params.items() if not n.startswith(JOINT)}, len(x))
        return inner.sgd(loss, theta, x, y, lr=self.inner_lr, steps=self.inner_steps, watch=watch)

    def meta_gradient(self, loss: TaskLoss, params: Params, tasks: TaskBatch, progress: Tensor | None = None) -> MetaGradient:
        if tasks.classes is None:
            raise ValueError(
                "finetune: the tasks do not say which classes their labels stand for, so no joint head can be trained"
            )
        params = tree.detach(params)
        joint = params | {n.removeprefix(JOINT): v for n, v in params.items() if n.startswith(JOINT)}
        theta = tree.tile({n: v for n, v in joint.items() if not n.startswith(JOINT)}, len(tasks.support_x))
        joint_loss = 0.5 * (
            loss(theta, tasks.support_x, tasks.classes.gather(1, tasks.support_y))
            + loss(theta, tasks.query_x, tasks.classes.gather(1, tasks.query_y))
        )
        return MetaGradient(tree.grad(joint_loss.mean(), params), joint_loss.detach())
