"""Run the study: python -m studies.protocols."""

import time

import torch
import typer

from stages import files, params
from stages.command import one_sentence, prepared
from stages.guard import guarded
from studies import room
from studies.protocols import figure, shifts
from studies.protocols.accuracies import accuracies, shortened, task_file
from studies.protocols.schema import SETTING, Protocols

NAME = "protocols"
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Measure how each choice that papers leave unsaid moves accuracies. METALIB_DEVICE chooses the device."""
    began = time.monotonic()
    file = params.read()
    asked = params.study(file, NAME, Protocols)
    cells = {name: shortened(cell, asked) for name, cell in files.load_protocol_cells().items()}
    if list(cells) != asked.learners:
        raise ValueError(f"data/cells/protocols.json holds {', '.join(cells)}, not studies.protocols.learners; dvc repro cells")
    data = files.load_characters()
    stored = {scheme: task_file(file, data, scheme, asked) for scheme in asked.schemes}
    device = prepared()
    found = accuracies(asked, cells, stored, torch.from_numpy(data.images).to(device))
    rows, ranked = shifts.shifts(asked, found), shifts.rankings(found)
    room.write(
        NAME,
        figure=figure.draw(rows),
        page=room.render(
            NAME,
            asked=asked,
            budget=file.studies[NAME].budget,
            shape=params.setting(file, SETTING),
            accuracies=shifts.accuracy_table(rows),
            orders=shifts.order_table(ranked),
            departures=len(ranked) - 1,
            certain=[name for name, r in ranked.items() if r.decided],
            swapped=[name for name, r in ranked.items() if r.swapped],
            meta_steps={name: cell.outer.meta_steps for name, cell in cells.items()},
            characters={scheme: len(file.train) for scheme, file in stored.items()},
        ),
        data={"shifts": rows},
        metrics=shifts.metrics(rows, ranked),
        device=device,
        began=began,
    )


if __name__ == "__main__":
    app()
