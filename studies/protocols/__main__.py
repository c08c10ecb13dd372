"""Run the study: python -m studies.protocols."""

from pathlib import Path

import torch
import typer

from metalib.models.loss import engine
from stages import files, meta_train, params
from stages.command import one_sentence, prepared
from stages.guard import guarded
from studies import computing
from studies.protocols.accuracies import accuracies, shortened, task_file
from studies.protocols.schema import SETTING, Protocols

NAME = "protocols"
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Measure how each choice that papers leave unsaid moves accuracies. METALIB_DEVICE chooses the device."""
    file = params.read()
    asked = params.study(file, NAME, Protocols)
    shape = params.setting(file, SETTING)
    cells = {name: shortened(cell, asked) for name, cell in files.load_protocol_cells().items()}
    if list(cells) != asked.learners:
        raise ValueError(f"data/cells/protocols.json holds {', '.join(cells)}, not studies.protocols.learners; dvc repro cells")
    data = files.load_characters()
    stored = {scheme: task_file(file, data, scheme, asked) for scheme in asked.schemes}
    device = prepared()
    engines = [
        engine(params.make_network(cell, way=shape.way, image_size=data.images.shape[-1]), device) for cell in cells.values()
    ]
    facts = [[cell.model_dump(mode="json") for cell in cells.values()], engines, vars(file.split), vars(file.tasks)]
    inputs = [files.CHARACTERS, Path(meta_train.__file__), Path(params.__file__)]
    with computing.study(NAME, asked, device, *facts, inputs=inputs) as study:
        found = accuracies(asked, cells, stored, torch.from_numpy(data.images).to(device), study)
        study.write(
            budget=file.studies[NAME].budget,
            shape=vars(shape),
            meta_steps={name: cell.outer.meta_steps for name, cell in cells.items()},
            characters={scheme: len(tasks.train) for scheme, tasks in stored.items()},
            accuracies={name: {learner: values.tolist() for learner, values in row.items()} for name, row in found.items()},
        )


if __name__ == "__main__":
    app()
