"""What all studies' pages share: a template to fill in, places for labels, and the files that belong to a page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from stages import files, tables
from stages.command import console

PAGES = jinja2.Environment(  # noqa: S701  # the pages are Markdown
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.globals["table"] = tables.markdown


def render(name: str, **values: Any) -> str:
    """The study's page: studies/<name>/page.md, a jinja2 template, filled in with `values`.

    Templates may also call `table(header, rows)`. A name that was not given is an error.
    """
    return PAGES.get_template(f"{name}/page.md").render(values)


def spread(values: Sequence[float], gap: float, log: bool = False) -> list[float]:
    """Where to write labels for these values so that neighbours are at least `gap` apart, a factor on a log axis.

    The labels keep the order of their values, and a crowded group stays centred on its values.
    """
    places = [math.log(value) for value in values] if log else list(values)
    gap = math.log(gap) if log else gap
    groups: list[list[int]] = []  # indices from the lowest value up; each group is a run of touching labels
    for index in sorted(range(len(places)), key=places.__getitem__):
        groups.append([index])
        while len(groups) > 1 and _bottom(groups[-1], places, gap) < _bottom(groups[-2], places, gap) + gap * len(groups[-2]):
            crowded = groups.pop()
            groups[-1] += crowded
    found = [0.0] * len(places)
    for group in groups:
        for position, index in enumerate(group):
            found[index] = _bottom(group, places, gap) + gap * position
    return [math.exp(place) for place in found] if log else found


def _bottom(group: list[int], places: list[float], gap: float) -> float:
    """Where the lowest label of a group goes."""
    return sum(places[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def results(name: str) -> dict[str, Any]:
    """What the study has found, and the values that it was computed with; ValueError where there is nothing to be read."""
    path = files.study_file(name)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); make it with: dvc repro {name}") from None
    return found


def write(
    name: str,
    *,
    figure: Figure,
    page: str,
    data: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, Any],
) -> None:
    """Write the study's page and what belongs to it, as dvc.yaml names them.

    Args:
        figure, page: reports/studies/<name>.png and .md.
        data: plots/studies/<name>/<table>.csv for each table, a list of rows.
        metrics: reports/studies/<name>.metrics.json, the few numbers to compare commits by.
    """
    with files.whole(Path(f"plots/studies/{name}")) as folder, files.whole(Path(f"reports/studies/{name}.png")) as picture:
        figure.savefig(picture, dpi=120, format="png", metadata={"Software": None})
        folder.mkdir()
        for table, rows in data.items():
            files.write_csv(folder / f"{table}.csv", rows)
    with files.whole(Path(f"reports/studies/{name}.md")) as beside:
        beside.write_text(page.rstrip() + "\n", encoding="utf-8")
    files.write_json(Path(f"reports/studies/{name}.metrics.json"), metrics)
    console.print(f"reports/studies/{name}.md", highlight=False)
