"""The meta-learners, one file each. A file is found by its name, and holds one pydantic dataclass that is a MetaLearner.

Adding one is adding a file here and a section of the same name to params.yaml.
"""

import pkgutil
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from metalib.complaints import checked
from metalib.types import MetaLearner


def names() -> list[str]:
    """Every algorithm there is, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def learner_class(name: str) -> type:
    """The dataclass of algorithms/<name>.py; ValueError for a name there is no file for."""
    if name not in names():
        raise ValueError(f"algorithm: {name!r} is not one of {', '.join(names())}")
    module = import_module(f"{__name__}.{name}")
    (found,) = (c for c in vars(module).values() if is_dataclass(c) and c.__module__ == module.__name__)
    assert isinstance(found, type)
    return found


def build(name: str, hyper: dict[str, Any]) -> MetaLearner:
    """The learner `name` with these hyper-parameters; ValueError names the one that is missing, unknown or out of range."""
    return checked(learner_class(name), hyper, name)
