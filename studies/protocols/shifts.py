"""From accuracies to shifts against the reference, and to the order of learners."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metalib.comparison import Ranking, interval, ranking, shift
from studies.protocols.choices import choices
from studies.protocols.schema import Protocols

Row = Mapping[str, Any]
Accuracies = Mapping[str, dict[str, Tensor]]  # by choice and learner, (tasks,)


def shifts(asked: Protocols, found: Accuracies) -> list[Row]:
    """A row for each choice and learner: accuracy in %, and its shift against the reference in points."""
    rows = list[Row]()
    for choice in choices(asked):
        for learner, values in found[choice.name].items():
            mean, half = interval(values)
            moved = shift(found["reference"][learner], values, paired=choice.paired)
            rows.append({
                "choice": choice.name, "learner": learner, "accuracy": round(100 * mean, 2), "ci95": round(100 * half, 2),
                "shift": round(100 * moved.mean, 2), "shift_ci95": round(100 * moved.ci95, 2), "paired": choice.paired,
            })  # fmt: skip
    return rows


def rankings(found: Accuracies) -> dict[str, Ranking]:
    """By choice, the order of learners beside the reference's."""
    return {name: ranking(found["reference"], each) for name, each in found.items()}


def metrics(rows: list[Row], ranked: Mapping[str, Ranking]) -> dict[str, dict[str, float]]:
    """For each departure from the reference: the mean shift over learners, and Kendall's tau of their order."""
    found: dict[str, dict[str, float]] = {"mean_shift": {}, "kendall_tau": {}}
    for name in list(ranked)[1:]:
        moved = [row["shift"] for row in rows if row["choice"] == name]
        key = name.replace(" ", "_")
        found["mean_shift"][key] = round(sum(moved) / len(moved), 2)
        found["kendall_tau"][key] = round(ranked[name].tau, 2)
    return found


def accuracy_table(rows: list[Row]) -> list[list[str]]:
    """Lines of the page's table: a choice, then each learner's accuracy and shift."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        line = lines.setdefault(row["choice"], [row["choice"]])
        accuracy = f"{row['accuracy']:.2f}"
        if row["choice"] == "reference":
            line.append(f"{accuracy} ± {row['ci95']:.2f}")
        else:
            line.append(f"{accuracy} ({row['shift']:+.2f} ± {row['shift_ci95']:.2f})")
    return list(lines.values())


def order_table(ranked: Mapping[str, Ranking]) -> list[list[str]]:
    """Lines of the page's table: a choice, the order of learners, tau, pairs that swapped, those that did so with certainty."""
    return [[name, " > ".join(r.order), f"{r.tau:.2f}", _pairs(r.swapped), _pairs(r.decided)] for name, r in ranked.items()]


def _pairs(swapped: list[tuple[str, str]]) -> str:
    return ", ".join(f"{now} before {once}" for once, now in swapped) or "-"
