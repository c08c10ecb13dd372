"""params.yaml, read in one place and checked once; an unknown key is refused, by name."""

import math
import re
import reprlib
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from metalib import algorithms
from metalib.complaints import checked
from metalib.data.glyphs import Glyphs
from metalib.data.omniglot import DRAWERS, Resize
from metalib.data.splits import Split
from metalib.data.tasks import Rotations
from metalib.models.conv4 import Conv4
from metalib.training import Outer

FILE = Path("params.yaml")
CHARACTERS = 1623  # of Omniglot
CLASSES = 1_000_000  # of joint training, at most: the head has a row for each
STORED = 100_000  # evaluation tasks, at most: they are drawn at once
SETTING = r"[1-9][0-9]*w[1-9][0-9]*s"
VALUES, DEPTH = 100_000, 20  # of the file, at most: aliases of aliases multiply
Budgets = Literal["quick", "paper"]
Values = dict[str, Any]
T = TypeVar("T")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    source: Literal["omniglot", "glyphs"]
    image_size: int = Field(ge=16, le=105)
    resize: Resize
    glyphs: Glyphs


class Tasks(Section):
    """The stored evaluation tasks."""

    seed: int
    rotations: Literal["tasks", "none"]
    validation: int = Field(ge=1, le=STORED)
    test: int = Field(ge=2, le=STORED)
    query: PositiveInt | None  # query images per class; None: as many as shots


class MetaTrain(Section):
    budget: Budgets
    statistics: Literal["transductive", "inductive"]
    rotations: Rotations
    tf32: bool
    seed: NonNegativeInt


class Counts(Section):
    """How often, and on how many tasks, a model is measured."""

    validations: PositiveInt  # in a training
    validation_tasks: PositiveInt
    test_tasks: int = Field(ge=2)  # an interval needs two


class Budget(Section):
    """What all algorithms share, which their own sections may override."""

    seeds: int = Field(ge=1, le=100)  # trained together
    counts: dict[str, Values]  # Counts: common, and a setting's own over it
    network: Values  # of Conv4
    outer: Values  # of Outer


class Study(Section):
    """A study's values; its own room says what they are."""

    budget: Budgets
    common: Values
    quick: Values
    paper: Values


class File(Section):
    """The whole file."""

    settings: list[str] = Field(min_length=1)
    data: Data
    split: Split
    tasks: Tasks
    meta_train: MetaTrain
    budgets: dict[Budgets, Budget]
    algorithms: dict[str, dict[Budgets, dict[str, Values]]]
    studies: dict[str, Study]


class Setting(Section):
    """What a name such as 5w1s stands for."""

    way: int = Field(ge=2)
    shot: PositiveInt
    query: PositiveInt


class Images(Section):
    """Images of each class in a meta-training task, where they differ from the setting's."""

    shot: PositiveInt | None = None
    query: PositiveInt | None = None


class Cell(Section):
    """Everything that one algorithm in one setting is trained with, and the hyper-parameters it is tested with."""

    algorithm: str
    setting: str
    budget: Budgets
    learner: Values  # hyper-parameters of the algorithm
    test: Values  # those of them that differ when it is validated and tested
    network: Values
    outer: Outer
    statistics: Literal["transductive", "inductive"]
    rotations: Rotations
    tf32: bool
    train_shot: int
    train_query: int
    seeds: list[int]
    validation_tasks: int
    own: list[str]  # dotted names of the values that come from the algorithm's section of this setting


def read() -> File:
    """params.yaml of the working folder; ValueError says what is wrong in it."""
    try:
        # The reader DVC uses: YAML 1.2, where 1e-3 is a number.
        values = YAML(typ="safe").load(FILE)
    except FileNotFoundError:
        raise ValueError(f"{FILE} is not in {Path.cwd()}; run from the project's root") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{FILE} is not a YAML mapping: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{FILE} is not a YAML mapping but {reprlib.repr(values)}")
    _require_plain(values)
    file = checked(File, values, str(FILE))
    for name in file.settings:
        if not re.fullmatch(SETTING, name):
            raise ValueError(f"settings: {name!r} is not of the form 5w1s (5 classes, 1 support image of each)")
        if file.settings.count(name) > 1:
            raise ValueError(f"settings: {name!r} is listed twice")
    return file


def _require_plain(values: Values) -> None:
    """ValueError for what is no finite number, word, list or mapping with words for keys, or has no end."""
    waiting: list[tuple[str, Any, int]] = [(str(FILE), values, 0)]
    seen = 0
    while waiting:
        where, value, depth = waiting.pop()
        seen += 1
        if seen > VALUES or depth > DEPTH:
            raise ValueError(f"{where}: more than {VALUES} values, or {DEPTH} levels of them; do aliases contain each other?")
        if isinstance(value, dict):
            if strange := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{where}: the key {reprlib.repr(strange[0])} is no word; write it in quotes")
            waiting += [(f"{where}.{key}", part, depth + 1) for key, part in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [(f"{where}.{place}", part, depth + 1) for place, part in reversed(list(enumerate(value)))]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {value} is no finite number")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{where}: {reprlib.repr(value)} is beyond 64 bits")
        elif not isinstance(value, str | float | int | None):
            raise ValueError(f"{where}: a {type(value).__name__} is neither a number, a word, a list nor a mapping")


def setting(file: File, name: str) -> Setting:
    """5w1s -> 5-way 1-shot, with the number of queries of the tasks section; ValueError for a name that is not listed."""
    if name not in file.settings:
        raise ValueError(f"setting: {name!r} is not one of {', '.join(file.settings)}; add it to settings in {FILE}")
    try:
        way, shot = (int(number) for number in name.removesuffix("s").split("w"))
        found = Setting(way=way, shot=shot, query=file.tasks.query or shot)
    except (ValidationError, ValueError):
        raise ValueError(f"setting: {name!r} is not of the form 5w1s (5 classes, 1 support image of each)") from None
    if found.shot + found.query > DRAWERS:
        raise ValueError(
            f"tasks.query: {found.query} queries and {shot} support images of a class in {name}, but each has only {DRAWERS}"
        )
    return found


def counts(file: File, setting_name: str, budget: Budgets | None = None) -> Counts:
    """How often, and on how many tasks, a model of the setting is measured."""
    budget = budget or file.meta_train.budget
    section = file.budgets[budget].counts
    return checked(Counts, section.get("common", {}) | section.get(f"s{setting_name}", {}), f"budgets.{budget}.counts")


def cell(file: File, algorithm: str, setting_name: str, budget: Budgets | None = None, changes: Values | None = None) -> Cell:
    """Everything about an algorithm in a setting, resolved and checked; ValueError names the wrong value.

    What the budget shares, the algorithm's `common` and its section of the setting lie over each other, and `changes`
    (dotted names, as in that section) over them all. `budget` is meta_train's unless it is given.
    """
    budget = budget or file.meta_train.budget
    where = f"algorithms.{algorithm}.{budget}"
    algorithms.learner_class(algorithm)
    try:
        shared, sections = file.budgets[budget], file.algorithms[algorithm][budget]
        common = sections["common"]
    except KeyError as error:
        raise ValueError(f"{FILE} has no {error.args[0]} where {where} or budgets.{budget} needs one") from None
    for section, keys in ((where, sections), (f"budgets.{budget}.counts", shared.counts)):
        if strange := [key for key in keys if key != "common" and not re.fullmatch(r"s\d+w\d+s", key)]:
            raise ValueError(f"{section}.{strange[0]} is neither common nor a setting (5w1s is written s5w1s)")
    measured = counts(file, setting_name, budget)
    own = _merge(sections.get(f"s{setting_name}") or {}, _nested(changes or {}))
    outer = {"validations": measured.validations} | shared.outer
    values = _merge(common, own)
    if (outer | (values.get("outer") or {})).get("optimiser") != "muon":  # the budget's rates of Muon are for it alone
        outer = {key: value for key, value in outer.items() if not key.startswith("kernel_")}
    values = _merge({"network": shared.network, "outer": outer}, values)
    groups = {key: values.pop(key, None) or {} for key in ("network", "outer", "test", "train")}
    for key, group in groups.items():
        if not isinstance(group, dict):
            raise ValueError(f"{where}.{key}: expected a mapping, got {group!r}")
    network, outer, test, train = groups.values()
    if "classes" in {field.name for field in fields(algorithms.learner_class(algorithm))}:
        values.setdefault("classes", joint_classes(file))
    algorithms.build(algorithm, values)  # refuses what is missing, unknown or out of range, before anything runs
    algorithms.build(algorithm, values | test)
    for classes in (some["classes"] for some in (values, test) if "classes" in some):
        if classes < joint_classes(file):
            raise ValueError(f"{where}.classes: {classes}, but the characters in 4 quarter turns are {joint_classes(file)}")
        if classes > CLASSES:
            raise ValueError(f"{where}.classes: {classes}, but at most {CLASSES} can be trained jointly")
    outer_loop = checked(Outer, outer, f"{where}.outer")
    if "carried" in (values.get("moments"), test.get("moments")) and (outer_loop.optimiser != "sgd" or outer_loop.lr > 1):
        raise ValueError(
            f"{where}.moments: carried goes with outer.optimiser sgd and outer.lr of at most 1; moments stay positive"
        )
    images = checked(Images, train, f"{where}.train")
    shape = setting(file, setting_name)
    shot, query = images.shot or shape.shot, images.query or shape.query
    if shot + query > DRAWERS:
        raise ValueError(f"{where}.train: {shot} support and {query} query images of a class, but each has only {DRAWERS}")
    if given := sorted({"way", "image_size"} & network.keys()):
        raise ValueError(
            f"{where}.network.{given[0]} is not a parameter here (value {reprlib.repr(network[given[0]])}); "
            "the setting has the way, data.image_size the size"
        )
    made = Cell(
        algorithm=algorithm,
        setting=setting_name,
        budget=budget,
        learner=values,
        test=test,
        network=network,
        outer=outer_loop,
        statistics=file.meta_train.statistics,
        rotations=file.meta_train.rotations,
        tf32=file.meta_train.tf32,
        train_shot=shot,
        train_query=query,
        seeds=[file.meta_train.seed + i for i in range(shared.seeds)],
        validation_tasks=measured.validation_tasks,
        own=sorted(_dotted(own)),
    )
    checked(Conv4, {"way": 2, "image_size": file.data.image_size} | network, f"{where}.network")
    return made


def joint_classes(file: File) -> int:
    """Classes of joint training: every character of the data in 4 quarter turns."""
    drawn = file.data.glyphs
    return 4 * (CHARACTERS if file.data.source == "omniglot" else (drawn.background + drawn.evaluation) * drawn.characters)


def study(file: File, name: str, kind: type[T]) -> T:
    """The study's values at its budget, checked; ValueError names a wrong one."""
    if name not in file.studies:
        raise ValueError(f"{FILE} has no studies.{name}")
    section = file.studies[name]
    return checked(kind, _merge(section.common, getattr(section, section.budget)), f"studies.{name}.{section.budget}")


def make_network(cell: Cell, *, way: int, image_size: int) -> Conv4:
    """The cell's network; ValueError names a wrong value."""
    return checked(Conv4, {"way": way, "image_size": image_size} | cell.network, "network")


def _merge(common: Values, own: Values) -> Values:
    """`own` over `common`, group by group."""
    merged = dict(common)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _nested(values: Values) -> Values:
    """{"outer.lr": 1} -> {"outer": {"lr": 1}}."""
    found: Values = {}
    for name, value in values.items():
        for key in reversed(name.split(".")):
            value = {key: value}
        found = _merge(found, value)
    return found


def _dotted(values: Values) -> Values:
    """The opposite of `_nested`."""
    found: Values = {}
    for key, value in values.items():
        inside = _dotted(value) if isinstance(value, dict) else {}
        found |= {f"{key}.{name}": part for name, part in inside.items()} or {key: value}
    return found
