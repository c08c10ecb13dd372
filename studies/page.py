"""python -m studies.page <study>"""

from importlib import import_module
from typing import Annotated

import typer

from stages.command import one_sentence
from stages.guard import guarded
from studies import room

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded("page")
def main(study: Annotated[str, typer.Argument(help="a folder of studies")]) -> None:
    """Write a study's page, figure, tables and metrics from what it has found."""
    import_module(f"studies.{study}.page").write(room.results(study))


if __name__ == "__main__":
    app()
