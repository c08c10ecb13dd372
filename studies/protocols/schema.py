"""What params.yaml says of the study."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

SETTING = "5w1s"
Scheme = Literal["characters", "vinyals", "alphabets"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Protocols:
    """The first of `schemes` and the first of `queries` are the reference's."""

    learners: Annotated[list[str], Field(min_length=2)]
    share: Annotated[float, Field(gt=0, le=1)]  # of the meta-steps that the budget of the same name gives each learner
    seeds: PositiveInt
    test_tasks: Annotated[int, Field(ge=2)]  # an interval needs two
    queries: Annotated[list[PositiveInt], Field(min_length=1)]  # query images per class
    schemes: Annotated[list[Scheme], Field(min_length=1)]  # of the split
