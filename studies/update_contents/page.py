"""The study's page, figure, data and metrics from what it has found."""

from typing import Any

from studies import room
from studies.update_contents import figure
from studies.update_contents.combinations import Measured
from studies.update_contents.expansions import Row
from studies.update_contents.schema import Values

NAME = "update_contents"


def write(found: dict[str, Any]) -> None:
    rows = [Row(**row) for row in found["coefficients"]]
    curves = [Measured(**point) for point in found["curves"]]
    last = {point.combination: round(100 * point.accuracy, 2) for point in curves}
    smallest = min(row.alpha for row in rows)
    room.write(
        NAME,
        figure=figure.draw(rows, curves),
        page=page(found, rows, last),
        data={
            "coefficients": [row._asdict() for row in rows],
            "learning_curves": [point._asdict() | {"accuracy": round(100 * point.accuracy, 2)} for point in curves],
        },
        metrics={
            "accuracy_joint": last["g1"],
            "accuracy_fomaml": last["g4"],
            "accuracy_reptile": last["g1 + ... + g4"],
            "largest_deviation": round(max(abs(r.inner - r.expected_inner) for r in rows if r.alpha == smallest), 4),
        },
    )


def page(found: dict[str, Any], rows: list[Row], last: dict[str, float]) -> str:
    values = Values(**found["values"])
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
        NAME, v=values, budget=found["budget"], protocol=found["protocol"], rows=measured,
        network=", ".join(f"{key} {value}" for key, value in values.network.items()),
        ranked=[[name, f"{accuracy:.2f}"] for name, accuracy in sorted(last.items(), key=lambda item: -item[1])],
    )  # fmt: skip
