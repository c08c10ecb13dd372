"""What the compare and leaderboard stages share: results, published numbers, and the line that says what they are of."""

import csv
import json
from pathlib import Path
from typing import Any

from stages import files, params

PUBLISHED = Path(__file__).with_name("published.csv")


def metrics(file: params.File, setting: str) -> dict[str, dict[str, Any]]:
    """The metrics of every algorithm of params.yaml that has been evaluated in the setting."""
    found = {name: files.metrics_file(setting, name) for name in file.algorithms}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def published() -> dict[tuple[str, str], tuple[str, str]]:
    """(algorithm, setting) -> accuracy and interval as they were published; no interval is the empty string."""
    with open(PUBLISHED, newline="") as table:
        return {(r["algorithm"], r["setting"]): (r["accuracy"], r["ci95"]) for r in csv.DictReader(table)}


def published_text(accuracy: str, half: str) -> str:
    return f"{accuracy} ± {half}" if half else accuracy


def provenance(rows: list[dict[str, Any]]) -> str:
    """Data, split, budget and protocol of some metrics, in one line; where they differ, all values are named."""

    def of(key: str) -> str:
        return " and ".join(sorted({str(row[key]) for row in rows}))

    return (
        f"data {of('data')} at {of('images')}, split {of('split')}, budget {of('budget')}, "
        f"{of('query')} query images per class, {of('tasks')} test tasks, {of('seeds')} training seed(s), "
        f"rotations: training {of('train_rotations')}, test {of('test_rotations')}, "
        f"trained with {of('train_statistics')} batch statistics"
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float, half: float) -> str:
    return f"{value:.2f} ± {half:.2f}"
