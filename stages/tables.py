"""What the pages share: results, published numbers, the line that states their protocol, and Markdown tables."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from metalib.complaints import checked
from stages import files

METRICS = Path("metrics")
PUBLISHED = Path(__file__).with_name("published.csv")
Percent = Annotated[float, Field(ge=0, le=100)]


class Result(TypedDict):
    """What the pages read of a metrics file and its provenance; there may be more."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # type: ignore[misc]

    accuracy: Percent
    ci95: Percent
    inductive: Percent
    inductive_ci95: Percent
    seed_std: NotRequired[Percent]
    budget: str
    data: str
    images: str
    split: str
    test_rotations: str
    train_rotations: str
    train_statistics: str
    way: PositiveInt
    shot: PositiveInt
    query: PositiveInt
    tasks: PositiveInt
    seeds: PositiveInt
    train_shot: PositiveInt
    train_query: PositiveInt
    meta_steps: NonNegativeInt
    meta_batch: PositiveInt
    inner_steps: NonNegativeInt


def settings() -> list[str]:
    """The settings that metrics/ has a folder for, by way and shot."""
    found = (re.fullmatch(r"(\d+)w(\d+)s", folder.name) for folder in METRICS.glob("*"))
    return [match[0] for match in sorted(filter(None, found), key=lambda match: (int(match[1]), int(match[2])))]


def learners(setting: str) -> list[str]:
    """Those that metrics/<setting> holds a result of."""
    return sorted(path.stem for path in (METRICS / setting).glob("*.json") if not path.name.endswith(".run.json"))


def results(setting: str, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """learner -> its metrics and their protocol, for these learners or for all, the most accurate first."""
    rows = {}
    for name in learners(setting) if names is None else names:
        stage = f"evaluate@{name}-{setting}"
        run, metrics = files.run_file(setting, name), files.metrics_file(setting, name)
        rows[name] = files.load_json(run, stage) | files.load_json(metrics, stage)
        with files.readable(metrics, stage):
            checked(Result, rows[name], f"with {run}")
    return dict(sorted(rows.items(), key=lambda item: -item[1]["accuracy"]))


def published() -> dict[tuple[str, str], tuple[str, str]]:
    """(learner, setting) -> accuracy and interval as they were published; no interval is the empty string."""
    with open(PUBLISHED, newline="") as table:
        return {(r["algorithm"], r["setting"]): (r["accuracy"], r["ci95"]) for r in csv.DictReader(table)}


def published_text(accuracy: str, half: str) -> str:
    return f"{accuracy} ± {half}" if half else accuracy


def title(rows: dict[str, dict[str, Any]]) -> str:
    """5-way 1-shot, from the results of a setting."""
    row = next(iter(rows.values()))
    return f"{row['way']}-way {row['shot']}-shot"


def provenance(rows: dict[str, dict[str, Any]]) -> str:
    """Data, split, budget and protocol of a setting's results, in one line; where they differ, all values are named."""

    def of(key: str) -> str:
        return " and ".join(str(value) for value in sorted({row[key] for row in rows.values()}))

    return (
        f"data {of('data')}, {of('images')}; split {of('split')}; budget {of('budget')}; training seeds: {of('seeds')}; "
        f"test tasks: {of('tasks')}; query images per class: {of('query')}; "
        f"rotations: {of('train_rotations')} in training, {of('test_rotations')} at test; "
        f"batch statistics in training: {of('train_statistics')}"
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""
    lines = [header, [*[":--"] * left, *["--:"] * (len(header) - left)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float, half: float) -> str:
    return f"{value:.2f} ± {half:.2f}"
