"""The study's page, figure, data and metrics from what it has found."""

from typing import Any

from studies import room
from studies.compute_memory import figure
from studies.compute_memory.jobs import Point, slope
from studies.compute_memory.schema import Values

NAME = "compute_memory"


def write(found: dict[str, Any]) -> None:
    points = [Point(**row) for row in found["points"]]
    lines = dict.fromkeys((point.engine, point.method) for point in points)
    slopes = {(engine, method): slope(points, engine, method) for engine, method in lines}
    room.write(
        NAME,
        figure=figure.draw(points, found["device"]),
        page=page(found, points, slopes),
        data={"points": found["points"]},
        metrics={
            f"{method.lower()}_mb_per_step_{engine}": round(mb, 3)
            for (engine, method), mb in slopes.items()
            if method in ("MAML", "iMAML")
        },
    )


def page(found: dict[str, Any], points: list[Point], slopes: dict[tuple[str, str], float]) -> str:
    values = Values(**found["values"])
    engines = dict[str, list[list[str]]]()
    for (engine, method), mb in slopes.items():
        line = [point for point in points if (point.engine, point.method) == (engine, method)]
        ends = [[str(point.steps), f"{point.mb:.0f}", f"{point.seconds:.3g}"] for point in (line[0], line[-1])]
        engines.setdefault(engine, []).append([method, f"{mb:.2f}", *ends[0], *ends[1]])
    return room.render(
        NAME, v=values, budget=found["budget"], device=found["device"], threads=found["threads"], engines=engines,
        network=", ".join(f"{key} {value}" for key, value in values.network.items()),
    )  # fmt: skip
