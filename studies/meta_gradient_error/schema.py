"""The study's section of params.yaml."""

from typing import Annotated

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

Kappa = Annotated[float, Field(gt=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Values:
    seed: int = Field(ge=0)
    tasks: PositiveInt
    size: int = Field(ge=2)  # weights, and images of a task
    lam: PositiveFloat
    inner_steps: int = Field(ge=10)  # at most
    points: int = Field(ge=5)  # of a curve, log-spaced
    kappa: Kappa  # of the figure's curves
    backprop_steps: list[PositiveInt] = Field(min_length=1)  # of truncated MAML
    cg_steps: list[PositiveInt] = Field(min_length=1)
    kappas: list[Kappa] = Field(min_length=2)  # of the tables
    target: float = Field(gt=1e-12, lt=1)  # the error whose cost is tabulated
    fit: tuple[PositiveFloat, PositiveFloat]  # the range of errors that rates are fitted to
