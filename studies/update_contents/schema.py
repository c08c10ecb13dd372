"""The study's section of params.yaml."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

Gradients = Annotated[int, Field(ge=2)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Coefficients:
    """How the coefficients of the expansions are measured."""

    shot: PositiveInt  # images of each class in a mini-batch
    batches: int = Field(ge=2)  # mini-batches of a task
    gradients: list[Gradients] = Field(min_length=1)  # k
    alphas: list[PositiveFloat] = Field(min_length=1)
    draws: int = Field(ge=2)  # tasks


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Combinations:
    """How the combinations of gradients are trained and tested."""

    shot: PositiveInt  # images of each class in an inner step
    inner_lr: float = Field(gt=0, le=10)  # and so the outer loop's rate, which training.Outer bounds by 10
    meta_step: float = Field(gt=0, le=1)  # the outer step is meta_step inner_lr times the combination; it falls linearly to 0
    meta_steps: PositiveInt
    meta_batch: PositiveInt
    validations: PositiveInt
    validation_tasks: PositiveInt
    test_steps: PositiveInt  # inner steps on a validation task, each on its whole support set


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Values:
    seed: int = Field(ge=0)
    network: dict[str, Any]  # of Conv4
    coefficients: Coefficients
    combinations: Combinations
