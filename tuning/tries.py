"""Run a list of tries and write what each gives on the validation tasks. The test tasks are not touched.

Tries are compared at equal CPU time (`seconds`; the number of meta-steps follows from the measured cost of one) or at equal
numbers of meta-steps (a `share` of those of budget quick).
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from benchmarks import report, step_cost
from metalib import complaints
from metalib.training import Diverged, Result
from stages import command, files, meta_train, params

RESULTS = Path("tuning/results")
VALIDATION_TASKS = {"5w1s": 600, "5w5s": 300, "20w1s": 200, "20w5s": 100}  # 100 in a setting of your own
HEAD = ["learner", "setting", "tried", "seeds", "CPU s", "meta-steps"]
Names = str | list[str]
Values = dict[str, Any]
app = typer.Typer(add_completion=False)


class Entry(BaseModel):
    """An entry of a list. It stands for one try, or where it has lists of values, for their product."""

    model_config = ConfigDict(extra="forbid")

    learner: Names
    setting: Names
    seconds: PositiveFloat | None = None  # of CPU time for each seed
    share: PositiveFloat | None = None  # of quick's meta-steps
    seeds: PositiveInt = 1
    changes: Values = Field(default={}, alias="set")  # values other than quick's, named as in the algorithm's section

    @model_validator(mode="after")
    def _complete(self) -> "Entry":
        if (self.seconds is None) == (self.share is None):
            raise ValueError("give either seconds or share")
        return self

    def tries(self) -> "list[Try]":
        return [
            Try(learner, setting, dict(zip(self.changes, values, strict=True)), self.seconds, self.share, self.seeds)
            for learner in many(self.learner)
            for setting in many(self.setting)
            for values in itertools.product(*map(many, self.changes.values()))
        ]


@dataclasses.dataclass(frozen=True)
class Try:
    """One training and its validation accuracies: a row of the table."""

    learner: str
    setting: str
    changes: Values
    seconds: float | None
    share: float | None
    seeds: int

    def cell(self, file: params.File) -> params.Cell:
        """The values to train with; ValueError if the learner, the setting or a change is wrong."""
        cell = params.cell(file, self.learner, self.setting, budget="quick", changes=self.changes)
        if self.seconds and not cell.outer.meta_steps:
            raise ValueError(f"{self.learner} takes no meta-steps, so it cannot be given seconds; use share: 1")
        seeds = [file.meta_train.seed + i for i in range(self.seeds)]
        tasks = VALIDATION_TASKS.get(self.setting, 100)
        return cell.model_copy(update={"seeds": seeds, "validation_tasks": tasks})


def many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@app.command()
@command.one_sentence
def main(
    path: Annotated[Path, typer.Argument(metavar="LIST", help="for instance tuning/rates.yaml", exists=True, dir_okay=False)],
    validations: Annotated[int, typer.Option(min=1, help="in a training, evenly spaced; the last is at its end")] = 4,
    out: Annotated[Path | None, typer.Option(help="default: tuning/results/<name of the list>.md")] = None,
) -> None:
    """Write a table of validation accuracies in %. Needs the data: dvc repro split."""
    listed = read(path)
    file = params.read()
    cells = [one.cell(file) for one in listed]  # so that a wrong value is found before the first training
    device = command.prepared(file.meta_train.tf32)
    torch.set_num_threads(1)
    equal = "CPU time" if listed[0].share is None else "numbers of meta-steps"
    head = report.header(f"Tries of {path.name} at equal {equal}", "tuning.tries", device)
    columns = [*HEAD, *(f"{100 * i / validations:.0f} %" for i in range(1, validations)), "end"]
    rows = list[list[object]]()
    for one, cell in zip(listed, cells, strict=True):
        rows.append(attempt(one, cell, validations, device))
        typer.echo(" ".join(map(str, rows[-1])))
        report.write(
            out or RESULTS / f"{path.stem}.md",
            head,
            "Validation accuracy in % after parts of a training: the mean over seeds, and from the lowest to the highest. "
            "quick: the values of params.yaml. CPU s: seconds for each seed, validation included where meta-steps were given.",
            report.table(columns, rows, left=3),
        )


def read(path: Path) -> list[Try]:
    """All tries of a list; ValueError says what is wrong in it."""
    try:
        entries = TypeAdapter(list[Entry]).validate_python(YAML(typ="safe").load(path))
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ValueError(complaints.describe(error, str(path))) from None
    if len({entry.share is None for entry in entries}) != 1:
        raise ValueError(f"{path}: give at least one entry, and either seconds in all entries or share in all")
    return [one for entry in entries for one in entry.tries()]


def attempt(one: Try, cell: params.Cell, validations: int, device: torch.device) -> list[object]:
    """A row of the table."""
    if one.share is not None:
        steps = one.share * cell.outer.meta_steps
    else:
        assert one.seconds is not None
        steps = one.seconds * one.seeds / step_cost.seconds_per_step(cell, device, time.process_time)
    between = max(1, round(steps / validations)) if steps else 0
    outer = dataclasses.replace(cell.outer, meta_steps=validations * between, validations=validations)
    cell = cell.model_copy(update={"outer": outer})
    start = time.process_time()
    try:
        for now in meta_train.train(cell, files.load_tasks(one.setting), device):
            result = now
        assert isinstance(result, Result)
        found = [spread(row.validation) for row in result.history if row.validation]
        found = [*[""] * (validations - len(found)), *found]  # a learner without meta-steps is validated once
    except Diverged:
        found = ["diverged", *[""] * (validations - 1)]
    seconds = f"{one.seconds:g}" if one.seconds else f"{(time.process_time() - start) / one.seeds:.0f}"
    tried = ", ".join(f"{key}={value}" for key, value in one.changes.items()) or "quick"
    return [one.learner, one.setting, tried, one.seeds, seconds, outer.meta_steps, *found]


def spread(accuracies: list[float]) -> str:
    mean = f"{100 * sum(accuracies) / len(accuracies):.2f}"
    return f"{mean} ({100 * min(accuracies):.1f} to {100 * max(accuracies):.1f})" if len(accuracies) > 1 else mean


if __name__ == "__main__":
    app()
