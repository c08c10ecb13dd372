"""Comparing learners by their accuracies on tasks: intervals, paired differences, shifts, rankings."""

import itertools
from typing import NamedTuple

from scipy import stats
from torch import Tensor


def interval(accuracies: Tensor) -> tuple[float, float]:
    """Mean over tasks and the half width of its 95 % interval, 1.96 s / sqrt(n), from accuracies (tasks,)."""
    values = accuracies.double()
    return float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)


class Difference(NamedTuple):
    """How much more accurate `first` is than `second` on the same tasks, in [-1, 1]."""

    first: str
    second: str
    mean: float
    ci95: float  # half width
    p: float  # of a paired t-test, Holm-corrected for the number of pairs


def differences(accuracies: dict[str, Tensor]) -> list[Difference]:
    """Every pair of learners, the better one first, from accuracies (tasks,) on the same tasks in the same order.

    The interval and the p-value are over the draw of test tasks: they hold for these trained weights, not for other seeds.
    p-values are multiplied step by step (Holm, Scand. J. Statist. 1979), so that the chance of any false claim is at most
    the level at which they are read.
    """
    pairs = []
    for a, b in itertools.combinations(accuracies, 2):
        gap = (accuracies[a] - accuracies[b]).double()
        first, second, gap = (a, b, gap) if gap.mean() >= 0 else (b, a, -gap)
        mean, half = interval(gap)
        p = float(stats.ttest_1samp(gap.numpy(), 0).pvalue) if gap.std() > 0 else float(mean == 0)
        pairs.append(Difference(first, second, mean, half, p))
    running, corrected = 0.0, {}
    for rank, pair in enumerate(sorted(pairs, key=lambda pair: pair.p)):
        running = max(running, min(1.0, (len(pairs) - rank) * pair.p))
        corrected[pair.first, pair.second] = running
    return [pair._replace(p=corrected[pair.first, pair.second]) for pair in pairs]


class Shift(NamedTuple):
    """Accuracy under a choice minus accuracy under the reference, in [-1, 1]."""

    mean: float
    ci95: float  # half width


def shift(reference: Tensor, other: Tensor, *, paired: bool) -> Shift:
    """From accuracies (tasks,): paired, on the same tasks in the same order; else on tasks drawn independently."""
    if paired:
        return Shift(*interval(other - reference))
    (before, a), (after, b) = interval(reference), interval(other)
    return Shift(after - before, (a**2 + b**2) ** 0.5)


class Ranking(NamedTuple):
    """How the order of learners under a choice compares with the reference's."""

    order: list[str]  # best first
    tau: float  # Kendall's; 1: the same order
    swapped: list[tuple[str, str]]  # pairs (ahead in the reference, ahead now)
    decided: list[tuple[str, str]]  # those of them whose order is significant at 5 % both times


def ranking(reference: dict[str, Tensor], other: dict[str, Tensor]) -> Ranking:
    """From each learner's accuracies (tasks,). Significant: paired t-tests on the tasks, Holm-corrected for all pairs."""
    before, after = ({name: float(values.double().mean()) for name, values in each.items()} for each in (reference, other))
    order = sorted(after, key=lambda name: -after[name])
    tau = float(stats.kendalltau([before[n] for n in order], [after[n] for n in order]).statistic)
    swapped = [(a, b) for a, b in itertools.permutations(before, 2) if before[a] > before[b] and after[b] > after[a]]
    certain = [{(d.first, d.second) for d in differences(each) if d.p < 0.05} for each in (reference, other)]
    return Ranking(order, tau, swapped, [(a, b) for a, b in swapped if (a, b) in certain[0] and (b, a) in certain[1]])
