"""The study's figure: memory above time, a column for each engine."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from stages import palette
from studies.compute_memory.jobs import Point

LEARNERS = {  # method -> the learner whose look it has
    "MAML": "maml",
    "MAML, recomputing": "maml",
    "truncated MAML": "maml_truncated",
    "FOMAML": "fomaml",
    "Reptile": "reptile",
    "iMAML": "imaml",
    "iMAML, Hessian-free": "imaml_hf",
}
LOOKS = {method: palette.style([learner])[learner] for method, learner in LEARNERS.items()}
LOOKS["MAML, recomputing"] |= {"linestyle": ":", "markerfacecolor": "white"}


def draw(points: Sequence[Point], device: str) -> Figure:
    """Both scales are logarithmic and shared by the engines, so that their columns can be compared."""
    engines = list(dict.fromkeys(point.engine for point in points))
    names = list(dict.fromkeys(point.method for point in points))
    figure = Figure(figsize=(1.5 + 4.5 * len(engines), 8), layout="constrained")
    axes = figure.subplots(2, len(engines), sharex=True, sharey="row", squeeze=False)
    for (memory, duration), engine in zip(axes.T, engines, strict=True):
        for name in names:
            line = [point for point in points if (point.engine, point.method) == (engine, name)]
            steps = [point.steps for point in line]
            memory.plot(steps, [point.mb for point in line], label=name, markersize=5, **LOOKS[name])
            duration.plot(steps, [point.seconds for point in line], markersize=5, **LOOKS[name])
        place = f"engine {engine}" if device == "cpu" else device
        memory.set(title=f"peak memory, {place}", xscale="log", yscale="log")
        duration.set(title=f"time, {place}", yscale="log", xlabel="inner steps (Hessian-free: Newton directions)")
    axes[0, 0].set(ylabel="MB")
    axes[1, 0].set(ylabel="seconds")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelbottom=True)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(StrMethodFormatter("{x:g}"))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure
