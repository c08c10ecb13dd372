"""The study's figure, from the rows of its table."""

from matplotlib.figure import Figure

from stages import palette
from studies.protocols.shifts import Row


def draw(rows: list[Row]) -> Figure:
    """Left: shifts against the reference. Right: accuracies. A dot with its interval for each learner under each choice."""
    choices, learners = (list(dict.fromkeys(row[key] for row in rows)) for key in ("choice", "learner"))
    figure = Figure(figsize=(11, 1.6 + 0.6 * len(choices)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (learner, look) in enumerate(palette.style(learners).items()):
        mine = [row for row in rows if row["learner"] == learner]
        places = [k + 0.14 * (i - (len(learners) - 1) / 2) for k in range(len(choices))]
        dots = look | {"linestyle": "none", "markersize": 5, "capsize": 2, "elinewidth": 1.2}
        moved = slice(1, None)  # the reference's own shift is 0
        left.errorbar(
            [row["shift"] for row in mine[moved]], places[moved], xerr=[row["shift_ci95"] for row in mine[moved]], **dots
        )
        right.errorbar([row["accuracy"] for row in mine], places, xerr=[row["ci95"] for row in mine], **dots, label=learner)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(yticks=range(len(choices)), yticklabels=choices, ylim=(len(choices) - 0.5, -0.5))
    left.set(title="Shift against the reference", xlabel="points")
    right.set(title="Test accuracy", xlabel="%")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", length=0)
        for k in range(0, len(choices), 2):
            axis.axhspan(k - 0.5, k + 0.5, color="black", alpha=0.04, linewidth=0)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=len(learners), frameon=False)
    return figure
