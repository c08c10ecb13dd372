"""python -m studies.meta_gradient_error"""

import torch
import typer

from stages import params
from stages.command import one_sentence
from stages.guard import guarded
from studies import computing
from studies.meta_gradient_error.curves import curves, rates
from studies.meta_gradient_error.schema import Values

app = typer.Typer(add_completion=False)
NAME = "meta_gradient_error"


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Measure the errors of meta-gradients. It runs in double precision on the CPU."""
    file = params.read()
    values = params.study(file, NAME, Values)
    budget = file.studies[NAME].budget
    with computing.study(NAME, values, torch.device("cpu")) as study:
        errors = curves(values)
        try:
            table = rates(values)
        except ValueError as error:
            raise ValueError(f"studies.{NAME}.{budget}: {error}") from None
        study.write(
            budget=budget, curves=[point._asdict() for point in errors], rates=[rate._asdict() for rate in table]
        )  # fmt: skip


if __name__ == "__main__":
    app()
