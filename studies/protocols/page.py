"""The study's page, figure, data and metrics from what it has found."""

from typing import Any

import torch

from studies import room
from studies.protocols import figure, shifts
from studies.protocols.schema import Protocols

NAME = "protocols"


def write(found: dict[str, Any]) -> None:
    asked = Protocols(**found["values"])
    accuracies = {
        name: {learner: torch.tensor(values) for learner, values in row.items()} for name, row in found["accuracies"].items()
    }
    rows, ranked = shifts.shifts(asked, accuracies), shifts.rankings(accuracies)
    room.write(
        NAME,
        figure=figure.draw(rows),
        page=room.render(
            NAME,
            asked=asked,
            budget=found["budget"],
            shape=found["shape"],
            accuracies=shifts.accuracy_table(rows),
            orders=shifts.order_table(ranked),
            departures=len(ranked) - 1,
            certain=[name for name, r in ranked.items() if r.decided],
            swapped=[name for name, r in ranked.items() if r.swapped],
            meta_steps=found["meta_steps"],
            characters=found["characters"],
        ),
        data={"shifts": rows},
        metrics=shifts.metrics(rows, ranked),
    )
