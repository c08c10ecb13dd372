"""python -m studies.update_contents"""

import torch
import typer

from metalib import training
from metalib.complaints import checked
from metalib.models.conv4 import Conv4
from metalib.models.loss import engine
from stages import files, params
from stages.command import one_sentence, prepared
from stages.guard import guarded
from studies import computing
from studies.update_contents import combinations, expansions
from studies.update_contents.schema import Values

app = typer.Typer(add_completion=False)
NAME = "update_contents"
SETTING = "5w5s"


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Measure the coefficients of the expansions, and train along the combinations of gradients.

    Coefficients are measured on the CPU; METALIB_DEVICE chooses where the combinations are trained.
    """
    file = params.read()
    values = params.study(file, NAME, Values)
    budget = file.studies[NAME].budget
    stored = files.load_tasks(SETTING)
    device = prepared()
    images = torch.from_numpy(files.load_characters().images)
    network = checked(
        Conv4, {"way": stored.protocol.way, "image_size": images.shape[-1]} | values.network, f"studies.{NAME}.{budget}.network"
    )
    validation = stored.validation.first(values.combinations.validation_tasks, "validation_tasks").to(device)
    inputs = [files.CHARACTERS, files.tasks_file(SETTING)]
    with computing.study(NAME, values, device, engine(network, device), inputs=inputs) as study:
        rows = study.part(
            "coefficients",
            lambda _: [
                row._asdict() for row in expansions.measure(values.coefficients, values.seed, network, images, stored.train)
            ],
        )
        try:
            curves = combinations.learning_curves(
                values.combinations, values.seed, network, images.to(device), stored.train.to(device), validation,
                stored.protocol.shot, study,
            )  # fmt: skip
        except training.Diverged as error:
            raise ValueError(f"studies.{NAME}.{budget}.combinations: {error}; lower inner_lr or meta_step") from None
        study.write(
            budget=budget, protocol=stored.protocol._asdict(), coefficients=rows, curves=[point._asdict() for point in curves]
        )


if __name__ == "__main__":
    app()
