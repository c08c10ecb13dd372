"""Which characters are for meta-training, which for model selection, which for the final test."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from metalib.data.omniglot import Characters
from metalib.randomness import generator

VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
VINYALS_TRAIN = 1200  # with validation; the rest of the 1,623 is the test set


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Split:
    """How the characters are divided.

    characters: at random, `test` and `validation` of them held out (MAML, Reptile, iMAML: 1,200 / 423).
    alphabets:  the official archives, background for training, evaluation for the test; whole background alphabets, drawn at
                random until they hold `validation` characters, for validation.
    vinyals:    1,028 / 172 / 423 as Vinyals et al. 2016 split Omniglot; by name, nothing is drawn.
    """

    scheme: Literal["characters", "vinyals", "alphabets"]
    seed: int
    validation: PositiveInt
    test: PositiveInt


class Classes(NamedTuple):
    """Indices into the array of characters, ascending; no character is in two of them."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def divide(data: Characters, split: Split) -> Classes:
    """The three sets of characters; ValueError when the scheme does not fit the data."""
    count = len(data.alphabets)
    if split.scheme == "characters":
        if split.validation + split.test >= count:
            raise ValueError(
                f"split.validation {split.validation} and split.test {split.test} leave none of {count} characters to train on"
            )
        order = torch.randperm(count, generator=generator(split.seed, "split")).numpy()
        test, validation = order[: split.test], order[split.test : split.test + split.validation]
    elif split.scheme == "alphabets":
        test = np.flatnonzero(~data.background)
        names = np.unique(data.alphabets[data.background])
        order = torch.randperm(len(names), generator=generator(split.seed, "split")).numpy()
        sizes = np.cumsum([np.sum(data.background & (data.alphabets == name)) for name in names[order]])
        chosen = names[order[: np.searchsorted(sizes, split.validation) + 1]]
        if len(chosen) == len(names):
            raise ValueError(f"split.validation {split.validation} leaves no background alphabet to train on")
        validation = np.flatnonzero(data.background & np.isin(data.alphabets, chosen))
    else:
        if data.source != "omniglot":
            raise ValueError(f"split.scheme: vinyals names alphabets of Omniglot, but data.source is {data.source}")
        test = np.arange(VINYALS_TRAIN, count)
        validation = np.flatnonzero(np.isin(data.alphabets, VINYALS_VALIDATION))
    train = np.setdiff1d(np.arange(count), np.concatenate([validation, test]))
    return Classes(train, np.sort(validation), np.sort(test))
