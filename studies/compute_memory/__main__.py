"""python -m studies.compute_memory"""

from typing import Any

import torch
import typer

from metalib.complaints import checked
from metalib.data import tasks
from metalib.models.conv4 import Conv4
from metalib.randomness import generator
from stages import files, params
from stages.command import device_name, one_sentence, prepared
from stages.guard import guarded
from studies import computing
from studies.compute_memory import jobs
from studies.compute_memory.schema import Values

app = typer.Typer(add_completion=False)
NAME = "compute_memory"


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Measure time and memory of meta-gradients.

    Each point is measured in a process of its own. METALIB_DEVICE chooses the device; on the CPU both engines are measured.
    """
    file = params.read()
    values = params.study(file, NAME, Values)
    budget = file.studies[NAME].budget
    images = torch.from_numpy(files.load_characters().images)
    device = prepared()
    network: dict[str, Any] = {"way": values.way, "image_size": images.shape[-1]} | values.network
    checked(Conv4, network, f"studies.{NAME}.{budget}.network")
    drawn = tasks.draw(
        1, torch.arange(len(images)), way=values.way, images=values.shot + values.query, drawers=images.shape[1],
        rotations="none", generators=[generator(values.seed, NAME)],
    )  # fmt: skip
    task = tasks.gather(images, drawn, values.shot)[:4]
    with computing.study(NAME, values, device, device_name(device), inputs=[files.CHARACTERS]) as study:
        study.write(budget=budget, points=[point._asdict() for point in jobs.points(values, network, task, study)])


if __name__ == "__main__":
    app()
