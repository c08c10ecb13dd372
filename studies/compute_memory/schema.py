"""The study's section of params.yaml."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from metalib import inner

Steps = Annotated[list[PositiveInt], Field(min_length=2)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Values:
    seed: int = Field(ge=0)
    way: int = Field(ge=2)
    shot: PositiveInt
    query: PositiveInt
    network: dict[str, Any]  # of Conv4
    inner_lr: inner.Rate
    inner_steps: Steps
    newton_steps: Steps  # of the Hessian-free solver
    backprop_steps: PositiveInt  # of truncated MAML
    lam: PositiveFloat
    cg_steps: PositiveInt
    halvings: int = Field(ge=0)  # of the Hessian-free solver's line search, at most
    repeats: PositiveInt  # timed calls, after a first one that is not
