"""Run the study: python -m studies.leap_comparison."""

import typer

from metalib.models.loss import engine
from stages import files, params
from stages.command import one_sentence, prepared
from stages.guard import guarded
from studies import computing
from studies.leap_comparison import methods, summary
from studies.leap_comparison.curves import compare
from studies.leap_comparison.schema import Comparison

NAME = "leap_comparison"
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Compare Leap with its rivals on whole alphabets. METALIB_DEVICE chooses the device."""
    file = params.read()
    asked = params.study(file, NAME, Comparison)
    data = files.load_characters()
    device = prepared()
    network = methods.make_network(asked, data.images.shape[-1])
    with computing.study(NAME, asked, device, engine(network, device), inputs=[files.CHARACTERS]) as study:
        curves = compare(asked, data, study)
        study.write(
            budget=file.studies[NAME].budget,
            data=f"{data.source}, {data.drawn}",
            areas=summary.areas(asked, curves),
            training_batches=summary.training_batches(curves),
            held_out_images=summary.held_out_images(asked, curves),
        )


if __name__ == "__main__":
    app()
