"""The choices: the reference, and every departure from it."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from studies.protocols.schema import Protocols, Scheme

Statistics = Literal["transductive", "inductive"]


class Choice(NamedTuple):
    """A way to train and to test. All but the reference differ from it in one thing."""

    name: str
    scheme: Scheme
    trained: Statistics  # batch statistics in meta-training
    tested: Statistics  # batch statistics at test
    query: int
    rotated: bool  # each class of a test task by 0, 90, 180 or 270 degrees
    paired: bool  # tested on the reference's tasks


def choices(asked: Protocols) -> Iterator[Choice]:
    """The reference first."""
    scheme, query = asked.schemes[0], asked.queries[0]
    yield Choice("reference", scheme, "transductive", "transductive", query, False, True)
    yield Choice("tested with inductive statistics", scheme, "transductive", "inductive", query, False, True)
    yield Choice("trained and tested with inductive statistics", scheme, "inductive", "inductive", query, False, True)
    for other in asked.queries[1:]:
        yield Choice(f"{other} query images per class", scheme, "transductive", "transductive", other, False, True)
    yield Choice("classes rotated at test", scheme, "transductive", "transductive", query, True, True)
    for name in asked.schemes[1:]:
        yield Choice(f"split {name}", name, "transductive", "transductive", query, False, False)
