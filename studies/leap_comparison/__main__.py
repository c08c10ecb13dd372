"""Run the study: python -m studies.leap_comparison."""

import time

import typer

from metalib.data.omniglot import DRAWERS
from stages import files, params
from stages.command import one_sentence, prepared
from stages.guard import guarded
from studies import room
from studies.leap_comparison import figure, summary
from studies.leap_comparison.curves import compare
from studies.leap_comparison.schema import Comparison

NAME = "leap_comparison"
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Compare Leap with its rivals on whole alphabets. METALIB_DEVICE chooses the device."""
    began = time.monotonic()
    file = params.read()
    asked = params.study(file, NAME, Comparison)
    data = files.load_characters()
    device = prepared()
    curves = compare(asked, data, device)
    areas = summary.areas(asked, curves)
    training_batches, held_out_images = summary.training_batches(curves), summary.held_out_images(asked, curves)
    section, most = file.studies[NAME], asked.alphabets[-1]
    room.write(
        NAME,
        figure=figure.draw(asked, areas, training_batches, held_out_images),
        page=room.render(
            NAME,
            asked=asked,
            published=section.common | section.paper,
            budget=section.budget,
            data=f"{data.source}, {data.drawn}",
            trained_images=DRAWERS - asked.held_out_images,
            rank=lambda key: [(summary.TITLES[method], mean) for method, mean in summary.ranked(areas, most, key)],
            numbers=lambda key, unit=1: summary.table(areas, asked.alphabets, key, unit),
        ),
        data={"areas": areas, "training_batches": training_batches, "held_out_images": held_out_images},
        metrics=summary.metrics(areas, most),
        device=device,
        began=began,
    )


if __name__ == "__main__":
    app()
