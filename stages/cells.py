"""Resolve params.yaml: the values that each algorithm is trained with in each setting, one small file for each cell."""

import typer

from stages import files, params
from stages.command import console, one_sentence
from stages.guard import guarded

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded("cells")
def main() -> None:
    """Write data/cells: <setting>/<algorithm>.json, the values of a training; <setting>.json, the number of test tasks.

    Trainings depend on these files and not on params.yaml, so that a changed value reruns the cells it reaches and no others.
    The study `protocols` has the values of its learners in protocols.json, for the same reason.
    """
    file = params.read()
    study = file.studies["protocols"]
    with files.whole(files.CELLS) as folder:
        for setting in file.settings:
            (folder / setting).mkdir(parents=True)
            for algorithm in file.algorithms:
                cell = params.cell(file, algorithm, setting)
                (folder / setting / f"{algorithm}.json").write_text(cell.model_dump_json(indent=1) + "\n")
            files.write_json(folder / f"{setting}.json", {"test_tasks": params.counts(file, setting).test_tasks})
        cells = {}
        for name in study.common["learners"] if "5w1s" in file.settings else []:
            if name not in file.algorithms:
                raise ValueError(f"studies.protocols.common.learners: {name!r} has no section under algorithms")
            cells[name] = params.cell(file, name, "5w1s", study.budget)
        files.write_json(folder / "protocols.json", {name: cell.model_dump(mode="json") for name, cell in cells.items()})
    console.print(f"{files.CELLS}: {len(file.algorithms)} algorithms in {len(file.settings)} settings")


if __name__ == "__main__":
    app()
