"""What a protocol hides: how far a choice that papers leave unsaid moves an accuracy, and whether it moves the ranking."""

import itertools
from typing import NamedTuple

from scipy import stats
from torch import Tensor

from metalib.evaluation import differences, interval


class Shift(NamedTuple):
    """Accuracy under a choice minus accuracy under the reference, in [-1, 1]."""

    mean: float
    ci95: float  # half width


def shift(reference: Tensor, other: Tensor, *, paired: bool) -> Shift:
    """From accuracies (tasks,): of the same tasks in the same order, or of tasks that have nothing to do with each other."""
    if paired:
        return Shift(*interval(other - reference))
    (before, a), (after, b) = interval(reference), interval(other)
    return Shift(after - before, (a**2 + b**2) ** 0.5)


class Ranking(NamedTuple):
    """How the order of learners under a choice compares with the reference's."""

    order: list[str]  # best first
    tau: float  # Kendall's, 1: the same order
    swapped: list[tuple[str, str]]  # pairs (ahead in the reference, ahead now)
    decided: list[tuple[str, str]]  # those of them whose order is certain at 5 % both times


def ranking(reference: dict[str, Tensor], other: dict[str, Tensor]) -> Ranking:
    """From each learner's accuracies (tasks,). Certain: paired t-tests on the tasks, Holm-corrected for all pairs."""
    before, after = ({name: float(values.double().mean()) for name, values in each.items()} for each in (reference, other))
    order = sorted(after, key=lambda name: -after[name])
    tau = float(stats.kendalltau([before[n] for n in order], [after[n] for n in order]).statistic)
    swapped = [(a, b) for a, b in itertools.permutations(before, 2) if before[a] > before[b] and after[b] > after[a]]
    certain = [{(d.first, d.second) for d in differences(each) if d.p < 0.05} for each in (reference, other)]
    return Ranking(order, tau, swapped, [(a, b) for a, b in swapped if (a, b) in certain[0] and (b, a) in certain[1]])
