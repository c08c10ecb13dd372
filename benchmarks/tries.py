"""What was tried to learn more in the same time, and what each gave on the validation tasks: a list of them, a run a line.

A try has the same CPU time as others (`seconds`; meta-steps follow from the measured cost of one), or the same meta-steps
(`share` of those of budget quick). Test tasks are not touched.
"""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from benchmarks import rates, report
from metalib import algorithms
from metalib.training import Diverged, Result
from stages import files, meta_train, params
from stages.command import device, keep_heap, one_sentence, tensor_float

TASKS = {"5w1s": 600, "5w5s": 300, "20w1s": 200, "20w5s": 100}  # of validation
HEAD = ["learner", "setting", "tried", "seeds", "CPU s", "meta-steps"]
app = typer.Typer(add_completion=False)


class Try(BaseModel):
    """A line of a list of tries."""

    model_config = ConfigDict(extra="forbid")

    learner: str
    setting: Literal["5w1s", "5w5s", "20w1s", "20w5s"]
    seconds: PositiveFloat | None = None  # of CPU time of each seed
    share: PositiveFloat | None = None  # of quick's meta-steps
    seeds: PositiveInt = 1
    changes: dict[str, Any] = Field(default={}, alias="set")  # values other than quick's

    @model_validator(mode="after")
    def _complete(self) -> "Try":
        if (self.seconds is None) == (self.share is None):
            raise ValueError("give either seconds or share")
        algorithms.learner_class(self.learner)
        return self


@app.command()
@one_sentence
def main(
    tries: Annotated[Path, typer.Argument(help="what to try", exists=True, dir_okay=False)] = Path("benchmarks/tries.yaml"),
    validations: Annotated[int, typer.Option(min=1, help="in a training, evenly spaced; the last one at its end")] = 4,
    out: Annotated[Path | None, typer.Option(help="default: benchmarks/results/<name of the list>.md")] = None,
) -> None:
    """Write a table of validation accuracies, in %, in the course of trainings."""
    listed = read(tries)
    where = device()
    torch.set_num_threads(1)
    keep_heap()
    tensor_float(params.read().meta_train.tf32)
    equal = "time" if listed[0].share is None else "meta-steps"
    head = report.header(f"Tried at equal {equal}", "benchmarks.tries", where)
    columns = [*HEAD, *(f"{100 * i / validations:.0f} %" for i in range(1, validations)), "end"]
    rows = list[list[object]]()
    for one in listed:
        rows.append(attempt(one, validations, where))
        typer.echo(" ".join(map(str, rows[-1])))
        report.write(
            out or report.RESULTS / f"{tries.stem}.md",
            head,
            "Validation accuracy in %, mean of the seeds (and from lowest to highest), after shares of a training. "
            "`quick`: the values of params.yaml. CPU s: of a seed; with its validations, where meta-steps were given.",
            report.table(columns, rows, 3),
        )


def read(path: Path) -> list[Try]:
    """ValueError says what is wrong in the list."""
    try:
        listed = TypeAdapter(list[Try]).validate_python(YAML(typ="safe").load(path))
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ValueError(algorithms.describe(error, str(path))) from None
    if len({one.share is None for one in listed}) != 1:
        raise ValueError(f"{path}: at least one line is wanted, and either seconds or share in all of them")
    return listed


def attempt(one: Try, validations: int, where: torch.device) -> list[object]:
    """A row of the table."""
    algorithm, setting, changes, seeds = one.learner, one.setting, one.changes, one.seeds
    made = cell(algorithm, setting, changes, seeds)
    if one.share is not None:
        steps = one.share * made.outer.meta_steps
    else:
        assert one.seconds is not None
        steps = one.seconds * seeds / rates.seconds_per_step(made, algorithm, setting, where, time.process_time)
    every = max(1, round(steps / validations))
    made = cell(algorithm, setting, changes | {"outer.meta_steps": validations * every, "outer.validate_every": every}, seeds)
    start = time.process_time()
    try:
        for now in meta_train.train(made, algorithm, setting, files.load_tasks(setting), made.seeds, where, None):
            result = now
        assert isinstance(result, Result)
        found = [spread(row.validation) for row in result.history if row.validation]
    except Diverged:
        found = ["diverged", *[""] * (validations - 1)]
    seconds = f"{one.seconds:g}" if one.seconds else f"{(time.process_time() - start) / seeds:.0f}"
    tried = ", ".join(f"{key}={value}" for key, value in changes.items()) or "quick"
    return [algorithm, setting, tried, seeds, seconds, validations * every, *found]


def cell(algorithm: str, setting: str, changes: dict[str, Any], seeds: int) -> params.Cell:
    """The cell of budget quick with other values, named as in params.yaml under its section."""
    file = params.read().model_dump()
    own = file["algorithms"][algorithm]["quick"][f"s{setting}"]
    for key, value in changes.items():
        *groups, last = key.split(".")
        section = own
        for group in groups:
            section = section.setdefault(group, {})
        section[last] = value
    file["meta_train"]["budget"] = "quick"
    file["budgets"]["quick"]["seeds"] = seeds
    file["budgets"]["quick"]["settings"][f"s{setting}"]["validation_tasks"] = TASKS[setting]
    return params.cell(params.File(**file), algorithm, setting)


def spread(accuracies: list[float]) -> str:
    mean = f"{100 * sum(accuracies) / len(accuracies):.2f}"
    return f"{mean} ({100 * min(accuracies):.1f} to {100 * max(accuracies):.1f})" if len(accuracies) > 1 else mean


if __name__ == "__main__":
    app()
