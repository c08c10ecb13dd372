"""One look for each learner, the same in every figure.

Each has a colour of its own; line and marker help where colours are hard to tell apart.
"""

import colorsys
import itertools
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's colours for the colour-blind without their yellow, which is faint on white, then Tol's "muted" and two greys.
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#882255", "#999933", "#332288", "#661100", "#7F7F7F", "#117733", "#AA4499",
)  # fmt: skip
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
LEARNERS = (  # in the order of the colours, the slides' five first; a learner of your own has the next one
    "maml", "fomaml", "reptile", "leap", "imaml", "imaml_hf", "anil",
    "maml_truncated", "meta_sgd", "maml_plus_plus", "finetune", "scratch",
)  # fmt: skip


def colours(count: int) -> list[str]:
    """That many colours, no two alike; beyond the fourteen chosen ones, hues at equal distances."""
    rest = max(0, count - len(COLOURS))
    hues = (colorsys.hls_to_rgb(i / rest, 0.45, 0.85) for i in range(rest))
    return [*COLOURS[:count], *("#" + "".join(f"{round(255 * part):02X}" for part in rgb) for rgb in hues)]


def style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """matplotlib's color, linestyle and marker for each name, sorted; those that are not in LEARNERS share what is left."""
    known = [*LEARNERS, *sorted(set(names) - set(LEARNERS))]
    looks = {
        name: {"color": colour, "linestyle": line, "marker": marker}
        for name, colour, line, marker in zip(
            known, colours(len(known)), itertools.cycle(LINES), itertools.cycle(MARKERS), strict=False
        )
    }
    return {name: looks[name] for name in sorted(names)}
