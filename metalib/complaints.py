"""Pydantic's complaints as one sentence: which parameter, what is wrong with it, the value."""

import json
import reprlib
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def checked(kind: type[T], values: Any, where: str) -> T:
    """kind(**values); ValueError names the value that is wrong, as a parameter of `where`.

    Every value is of its own type already: "3" and true are no integers, though Python or pydantic may take them for one.
    """
    try:  # by way of JSON, where strict types take mappings for dataclasses, and lists for tuples
        return TypeAdapter(kind).validate_json(json.dumps(values, default=repr), strict=True)
    except ValidationError as error:
        raise ValueError(describe(error, where)) from None


def describe(error: ValidationError, where: str) -> str:
    """The first complaint as one sentence."""
    first = error.errors()[0]
    field = ".".join([where, *(str(part) for part in first["loc"])])
    if not first["loc"] or first["type"] == "value_error":  # of several parameters together
        return f"{field}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{field} is missing"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{field} is not a parameter here (value {reprlib.repr(first['input'])}); remove it or correct its name"
    return f"{field}: {first['msg']}, got {reprlib.repr(first['input'])}"
