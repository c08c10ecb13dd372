"""What params.yaml says of the study."""

from typing import Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from metalib.data.omniglot import DRAWERS

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Augmentation:
    """Each image is turned, scaled and moved by amounts drawn uniformly from these ranges."""

    degrees: float = Field(ge=0, le=360)  # turned by 0 to this many degrees
    shift: float = Field(ge=0, lt=1)  # moved by at most this part of the size, in both directions
    smallest: PositiveFloat  # scaled by a factor between these two
    largest: PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OuterRates:
    """Learning rates of the outer SGD."""

    leap: PositiveFloat
    reptile: PositiveFloat
    fomaml: PositiveFloat
    maml: PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LeapChoices:
    """The variants of metalib/algorithms/leap.py."""

    norm: bool
    loss: bool
    stabiliser: bool


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Comparison:
    """Everything the comparison depends on."""

    seeds: list[NonNegativeInt] = Field(min_length=1)  # each with alphabets, characters, initial weights and draws of its own
    alphabets: list[PositiveInt] = Field(min_length=1)  # numbers of meta-training alphabets, n; ascending
    test_alphabets: PositiveInt
    way: int = Field(ge=2)  # characters of an alphabet; smaller alphabets are left out
    held_out_images: int = Field(ge=1, lt=DRAWERS)  # of each character, never trained on
    augmentation: Augmentation
    downsample: Literal["stride", "maxpool"]
    filters: PositiveInt
    inner_batch: PositiveInt  # images in an inner step
    inner_steps: PositiveInt  # on a test task; in meta-training, too, except MAML's
    maml_steps: PositiveInt  # MAML's inner steps in meta-training
    inner_lr: PositiveFloat
    outer_lr: OuterRates
    leap: LeapChoices
    meta_steps: PositiveInt
    meta_batch: PositiveInt
    measure_every: PositiveInt  # inner steps between two measurements on the held-out images
    window: PositiveInt  # of the moving average that smooths the figure's training loss

    @model_validator(mode="after")
    def _fits(self) -> "Comparison":
        if sorted(set(self.alphabets)) != self.alphabets:
            raise ValueError(f"alphabets must ascend, got {self.alphabets}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")
        if self.inner_steps % self.measure_every:
            raise ValueError(
                f"inner_steps must be a multiple of measure_every, got {self.inner_steps} and {self.measure_every}"
            )
        if self.window > self.inner_steps:
            raise ValueError(f"window must not exceed inner_steps, got {self.window} and {self.inner_steps}")
        if self.augmentation.smallest > self.augmentation.largest:
            raise ValueError("augmentation: smallest is larger than largest")
        return self
