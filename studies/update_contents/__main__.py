"""python -m studies.update_contents"""

import time

import torch
import typer

from metalib import training
from metalib.complaints import checked
from metalib.data.tasks import Protocol
from metalib.models.conv4 import Conv4
from stages import files, params
from stages.command import console, one_sentence, prepared
from stages.guard import guarded
from studies import room
from studies.update_contents import combinations, expansions, figure
from studies.update_contents.schema import Values

app = typer.Typer(add_completion=False)
NAME = "update_contents"
SETTING = "5w5s"


@app.command()
@one_sentence
@guarded(NAME)
def main() -> None:
    """Write the study update_contents: figure, page, coefficients, learning curves, metrics.

    Coefficients are measured on the CPU; METALIB_DEVICE chooses where the combinations are trained.
    """
    began = time.monotonic()
    file = params.read()
    values = params.study(file, NAME, Values)
    budget = file.studies[NAME].budget
    stored = files.load_tasks(SETTING)
    device = prepared()
    images = torch.from_numpy(files.load_characters().images)
    network = checked(
        Conv4, {"way": stored.protocol.way, "image_size": images.shape[-1]} | values.network, f"studies.{NAME}.{budget}.network"
    )
    validation = stored.validation.first(values.combinations.validation_tasks, "validation_tasks")
    rows = expansions.measure(values.coefficients, values.seed, network, images, stored.train)
    curves = list[combinations.Measured]()
    try:
        for measured in combinations.learning_curves(
            values.combinations, values.seed, network, images.to(device), stored.train.to(device), validation.to(device),
            stored.protocol.shot,
        ):  # fmt: skip
            accuracy = f"{100 * measured.accuracy:.2f} %"
            console.print(f"{measured.combination}: meta-step {measured.step}, {accuracy}", highlight=False)
            curves.append(measured)
    except training.Diverged as error:
        raise ValueError(f"studies.{NAME}.{budget}.combinations: {error}; lower inner_lr or meta_step") from None
    last = {m.combination: round(100 * m.accuracy, 2) for m in curves}
    smallest = min(row.alpha for row in rows)
    room.write(
        NAME,
        figure=figure.draw(rows, curves),
        page=page(values, budget, stored.protocol, rows, last),
        data={
            "coefficients": [row._asdict() for row in rows],
            "learning_curves": [m._asdict() | {"accuracy": round(100 * m.accuracy, 2)} for m in curves],
        },
        metrics={
            "accuracy_joint": last["g1"],
            "accuracy_fomaml": last["g4"],
            "accuracy_reptile": last["g1 + ... + g4"],
            "largest_deviation": round(max(abs(r.inner - r.expected_inner) for r in rows if r.alpha == smallest), 4),
        },
        device=device,
        began=began,
    )


def page(values: Values, budget: str, protocol: Protocol, rows: list[expansions.Row], last: dict[str, float]) -> str:
    measured = [
        [
            f"{figure.LABELS[row.learner]}, k = {row.k}, alpha = {row.alpha:g}",
            f"{row.expected_average:g}", f"{row.average:.5f} ± {row.average_error:.1g}",
            f"{row.expected_inner:g}", f"{row.inner:.4f} ± {row.inner_error:.1g}",
            f"{row.residual:.2g}",
        ]
        for row in rows
    ]  # fmt: skip
    return room.render(
        NAME, v=values, budget=budget, protocol=protocol, rows=measured,
        network=", ".join(f"{key} {value}" for key, value in values.network.items()),
        ranked=[[name, f"{accuracy:.2f}"] for name, accuracy in sorted(last.items(), key=lambda item: -item[1])],
    )  # fmt: skip


if __name__ == "__main__":
    app()
