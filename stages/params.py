"""params.yaml, read in one place and checked once; an unknown key is refused, by name."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from metalib import algorithms
from metalib.algorithms import describe
from metalib.data.glyphs import Glyphs
from metalib.data.omniglot import DRAWERS, Resize
from metalib.data.splits import Split
from metalib.data.tasks import Rotations
from metalib.models.conv4 import Conv4
from metalib.training import Outer

FILE = Path("params.yaml")
CHARACTERS = 1623  # of Omniglot
T = TypeVar("T")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    source: Literal["omniglot", "glyphs"]
    image_size: int = Field(ge=16, le=105)
    resize: Resize
    glyphs: Glyphs


class Queries(Section):
    query: PositiveInt


class Tasks(Section):
    """The stored evaluation tasks."""

    seed: int
    rotations: Literal["tasks", "none"]
    validation: PositiveInt
    test: PositiveInt
    settings: dict[str, Queries]


class MetaTrain(Section):
    budget: Literal["quick", "paper"]
    statistics: Literal["transductive", "inductive"]
    rotations: Rotations
    tf32: bool
    seed: NonNegativeInt


class Counts(Section):
    validation_tasks: PositiveInt
    test_tasks: PositiveInt


class Budget(Section):
    seeds: PositiveInt
    settings: dict[str, Counts]


class Study(Section):
    """A study's two budgets; the study's own stage says what is in them."""

    budget: Literal["quick", "paper"]
    quick: dict[str, Any]
    paper: dict[str, Any]


class File(Section):
    """The whole file."""

    data: Data
    split: Split
    tasks: Tasks
    meta_train: MetaTrain
    budgets: dict[Literal["quick", "paper"], Budget]
    algorithms: dict[str, dict[Literal["quick", "paper"], dict[str, dict[str, Any]]]]
    studies: dict[str, Study]


class Setting(Section):
    """What a name such as 5w1s stands for."""

    way: int = Field(ge=2)
    shot: PositiveInt
    query: PositiveInt


class Images(Section):
    """Images of each class in a meta-training task, where they are others than the setting's."""

    shot: PositiveInt | None = None
    query: PositiveInt | None = None


class Cell(Section):
    """Everything that one algorithm in one setting is trained and tested with."""

    learner: dict[str, Any]  # hyper-parameters of the algorithm
    test: dict[str, Any]  # those of them that differ when it is validated and tested
    network: dict[str, Any]
    outer: Outer
    statistics: Literal["transductive", "inductive"]
    rotations: Rotations
    tf32: bool
    train_shot: int
    train_query: int
    seeds: list[int]
    validation_tasks: int


def read() -> File:
    """params.yaml of the working folder; ValueError says what is wrong in it."""
    try:
        # The reader DVC uses: YAML 1.2, where 1e-3 is a number.
        return File(**YAML(typ="safe").load(FILE))
    except FileNotFoundError:
        raise ValueError(f"{FILE} is not in {Path.cwd()}; run from the project's root") from None
    except (YAMLError, TypeError) as error:
        raise ValueError(f"{FILE} is not a YAML mapping: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ValueError(describe(error, str(FILE))) from None


def setting(file: File, name: str) -> Setting:
    """5w1s -> 5-way 1-shot, with the number of queries from the tasks section; ValueError for a name not in it."""
    if f"s{name}" not in file.tasks.settings:
        known = ", ".join(key[1:] for key in file.tasks.settings)
        raise ValueError(f"setting: {name!r} is not one of {known}; add s{name} to tasks.settings in {FILE}")
    query = file.tasks.settings[f"s{name}"].query
    try:
        way, shot = (int(number) for number in name.removesuffix("s").split("w"))
        found = Setting(way=way, shot=shot, query=query)
    except (ValidationError, ValueError):
        raise ValueError(f"setting: {name!r} is not of the form 5w1s (5 classes, 1 support image of each)") from None
    if found.shot + found.query > DRAWERS:
        raise ValueError(
            f"tasks.settings.s{name}.query: {query} queries and {shot} support images of a class, but each has only {DRAWERS}"
        )
    return found


def cell(file: File, algorithm: str, setting_name: str) -> Cell:
    """The algorithm's `common` values with the setting's own laid over them, checked; ValueError names the wrong one."""
    budget = file.meta_train.budget
    where = f"algorithms.{algorithm}.{budget}"
    algorithms.learner_class(algorithm)
    try:
        sections = file.algorithms[algorithm][budget]
        values = _merge(sections["common"], sections[f"s{setting_name}"])
        counts = file.budgets[budget]
        validation_tasks = counts.settings[f"s{setting_name}"].validation_tasks
    except KeyError as error:
        raise ValueError(f"{FILE} has no {error.args[0]} where {where} or budgets.{budget} needs one") from None
    groups = {key: values.pop(key, None) or {} for key in ("network", "outer", "test", "train")}
    for key, group in groups.items():
        if not isinstance(group, dict):
            raise ValueError(f"{where}.{key}: a mapping is wanted, got {group!r}")
    network, outer, test, train = groups.values()
    algorithms.build(algorithm, values)  # refuses what is missing, unknown or out of range, before anything runs
    algorithms.build(algorithm, values | test)
    outer_loop = _checked(Outer, outer, f"{where}.outer")
    drawn = file.data.glyphs
    characters = CHARACTERS if file.data.source == "omniglot" else (drawn.background + drawn.evaluation) * drawn.characters
    if values.get("classes", 4 * characters) < 4 * characters:
        raise ValueError(
            f"{where}.classes: {values['classes']}, but {characters} characters in 4 quarter turns are {4 * characters}"
        )
    if "carried" in (values.get("moments"), test.get("moments")) and (outer_loop.optimiser != "sgd" or outer_loop.lr > 1):
        raise ValueError(
            f"{where}.moments: carried goes with outer.optimiser sgd and outer.lr of at most 1; moments stay positive"
        )
    images = _checked(Images, train, f"{where}.train")
    shape = setting(file, setting_name)
    shot, query = images.shot or shape.shot, images.query or shape.query
    if shot + query > DRAWERS:
        raise ValueError(f"{where}.train: {shot} support and {query} query images of a class, but each has only {DRAWERS}")
    made = Cell(
        learner=values,
        test=test,
        network=network,
        outer=outer_loop,
        statistics=file.meta_train.statistics,
        rotations=file.meta_train.rotations,
        tf32=file.meta_train.tf32,
        train_shot=shot,
        train_query=query,
        seeds=[file.meta_train.seed + i for i in range(counts.seeds)],
        validation_tasks=validation_tasks,
    )
    make_network(made, way=2, image_size=file.data.image_size)
    return made


def study(file: File, name: str, kind: type[T]) -> T:
    """The study's values at its budget, checked; ValueError names a wrong one."""
    if name not in file.studies:
        raise ValueError(f"{FILE} has no studies.{name}")
    section = file.studies[name]
    return _checked(kind, getattr(section, section.budget), f"studies.{name}.{section.budget}")


def make_network(cell: Cell, *, way: int, image_size: int) -> Conv4:
    """The cell's network; ValueError names a wrong value."""
    return _checked(Conv4, {"way": way, "image_size": image_size} | cell.network, "network")


def _checked(kind: type[T], values: dict[str, Any], where: str) -> T:
    """kind(**values); ValueError names a wrong value."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError(describe(error, where)) from None


def _merge(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `common`, group by group."""
    merged = dict(common)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
