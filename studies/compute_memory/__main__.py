"""python -m studies.compute_memory"""

import time
from typing import Any

import torch
import typer

from metalib.complaints import checked
from metalib.data import tasks
from metalib.models.conv4 import Conv4
from metalib.randomness import generator
from stages import files, params
from stages.command import console, one_sentence, prepared
from stages.guard import guarded
from studies import room
from studies.compute_memory import figure, jobs
from studies.compute_memory.schema import Values

app = typer.Typer(add_completion=False)
NAME = "compute_memory"


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Write the study compute_memory: figure, page, measured points, metrics.

    Each point is measured in a process of its own. METALIB_DEVICE chooses the device; on the CPU both engines are measured.
    """
    began = time.monotonic()
    file = params.read()
    values = params.study(file, NAME, Values)
    budget = file.studies[NAME].budget
    images = torch.from_numpy(files.load_characters().images)
    device = prepared()
    network: dict[str, Any] = {"way": values.way, "image_size": images.shape[-1]} | values.network
    checked(Conv4, network, f"studies.{NAME}.{budget}.network")
    drawn = tasks.draw(
        1, torch.arange(len(images)), way=values.way, images=values.shot + values.query, drawers=images.shape[1],
        rotations="none", generator=generator(values.seed, NAME),
    )  # fmt: skip
    points = list[jobs.Point]()
    for point in jobs.points(values, network, tasks.gather(images, drawn, values.shot)[:4], device):
        console.print(
            f"{point.engine}, {point.method}, {point.steps} inner steps: {point.mb:.1f} MB, {point.seconds:.3f} s",
            highlight=False,
        )
        points.append(point)
    slopes = {(p.engine, p.method): jobs.slope(points, p.engine, p.method) for p in points}
    room.write(
        NAME,
        figure=figure.draw(points, device),
        page=page(values, budget, device, points, slopes),
        data={"points": [point._asdict() for point in points]},
        metrics={
            f"{method.lower()}_mb_per_step_{engine}": round(slope, 3)
            for (engine, method), slope in slopes.items()
            if method in ("MAML", "iMAML")
        },
        device=device,
        began=began,
    )


def page(
    values: Values, budget: str, device: torch.device, points: list[jobs.Point], slopes: dict[tuple[str, str], float]
) -> str:
    engines = dict[str, list[list[str]]]()
    for (engine, method), slope in slopes.items():
        line = [point for point in points if (point.engine, point.method) == (engine, method)]
        ends = [[str(point.steps), f"{point.mb:.0f}", f"{point.seconds:.3g}"] for point in (line[0], line[-1])]
        engines.setdefault(engine, []).append([method, f"{slope:.2f}", *ends[0], *ends[1]])
    return room.render(
        NAME, v=values, budget=budget, device=device.type, threads=torch.get_num_threads(), engines=engines,
        network=", ".join(f"{key} {value}" for key, value in values.network.items()),
    )  # fmt: skip


if __name__ == "__main__":
    app()
