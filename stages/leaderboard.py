"""All settings in the shape of the slides' table."""

import math
from pathlib import Path

import typer

from stages import files, tables
from stages.command import console, one_sentence
from stages.guard import guarded

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded("leaderboard")
def main() -> None:
    """Write reports/leaderboard.md and plots/leaderboard.csv from every result in metrics/."""
    found = {setting: tables.results(setting) for setting in tables.settings()}
    found = {setting: rows for setting, rows in found.items() if rows}
    if not found:
        raise ValueError("metrics/ holds no result; make them with: dvc repro")
    names = ranked(found)
    known = tables.published()
    text = ["# Leaderboard", "Test accuracy in %, with its 95 % interval over test tasks, ranked by the first column."]
    for kind, half in (("accuracy", "ci95"), ("inductive", "inductive_ci95")):
        table = []
        for name in names:
            cells = [rows.get(name) for rows in found.values()]
            table.append([name, *(tables.percent(cell[kind], cell[half]) if cell else "-" for cell in cells)])
            if kind == "accuracy" and any((name, setting) in known for setting in found):
                theirs = [known.get((name, setting)) for setting in found]
                table.append([f"{name}, published", *(tables.published_text(*t) if t else "-" for t in theirs)])
        text += [
            "## Transductive" if kind == "accuracy" else "## Inductive",
            tables.markdown(["learner", *(tables.title(rows) for rows in found.values())], table),
        ]
    text += [
        "## The protocol of each column",
        "\n".join(f"- {tables.title(rows)}: {tables.provenance(rows)}" for rows in found.values()),
        "Published numbers are transductive, and measured on their authors' own test tasks. They are from the slides' table "
        "or, where it has no row, from the papers: MAML++ (Antoniou et al. 2019, an ensemble) and ANIL (Raghu et al. 2020). "
        "Each is of 600 tasks with as many query images per class as shots; Reptile's are of 10,000 tasks with one.",
    ]
    with files.whole(Path("reports/leaderboard.md")) as beside:
        beside.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    columns = ("accuracy", "ci95", "inductive", "budget", "data")
    files.write_csv(
        Path("plots/leaderboard.csv"),
        [
            {"setting": setting, "algorithm": name} | {column: rows[name][column] for column in columns}
            for setting, rows in found.items()
            for name in names
            if name in rows
        ],
    )
    console.print(f"reports/leaderboard.md: {len(names)} learners in {len(found)} settings")


def ranked(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Every learner, by its accuracy in the first setting; those that lack it follow, by the next; equals by name."""

    def rank(name: str) -> list[float | str]:
        return [*(-rows[name]["accuracy"] if name in rows else math.inf for rows in found.values()), name]

    return sorted({name for rows in found.values() for name in rows}, key=rank)


if __name__ == "__main__":
    app()
