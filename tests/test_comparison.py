"""Intervals and paired differences by hand. Shifts and rankings are tested in test_protocols.py."""

import pytest
import torch

from metalib import comparison
from metalib.randomness import generator


def test_interval_by_hand() -> None:
    """0.2, 0.4, 0.9: mean 0.5, deviations -0.3, -0.1, 0.4, variance 0.26 / 2, half width 1.96 sqrt(0.13 / 3)."""
    assert comparison.interval(torch.tensor([0.2, 0.4, 0.9])) == pytest.approx((0.5, 1.96 * (0.13 / 3) ** 0.5))


def test_differences_are_paired() -> None:
    """Two learners that always differ by one point differ for certain, however much the tasks vary."""
    base = torch.rand(50, generator=generator(0, "x"), dtype=torch.float64) * 0.8
    noise = 1e-4 * torch.randn(50, generator=generator(1, "x"), dtype=torch.float64)
    (pair,) = comparison.differences({"a": base, "b": base + 0.01 + noise})
    assert (pair.first, pair.second) == ("b", "a")
    assert pair.mean == pytest.approx(0.01, abs=1e-4) and pair.ci95 < 1e-4 and pair.p < 1e-10


def test_p_values_by_hand_with_holms_correction() -> None:
    """Differences a-b: 1, 2, 3 (mean 2, s 1, t = 2 sqrt 3, two degrees of freedom); b-c: 1, 0, 2 (mean 1, s 1, t = sqrt 3);
    a-c: 2, 2, 5 (mean 3, s sqrt 3, t = 3). With two degrees of freedom p = 1 - t / sqrt(t^2 + 2):
    0.0742, 0.2254, 0.0955. Holm: smallest x 3, next x 2 but not less, largest x 1: 0.2226, 0.2254, 0.2226.

    Seen failing with Bonferroni's correction, with no correction, and with an unpaired test.
    """
    c = torch.tensor([5.0, 1.0, 3.0], dtype=torch.float64)
    b = c + torch.tensor([1.0, 0.0, 2.0])
    a = b + torch.tensor([1.0, 2.0, 3.0])
    found = {(d.first, d.second): d for d in comparison.differences({"a": a, "b": b, "c": c})}
    raw = {pair: 1 - t / (t**2 + 2) ** 0.5 for pair, t in ((("a", "b"), 12**0.5), (("b", "c"), 3**0.5), (("a", "c"), 3.0))}
    smallest = 3 * raw["a", "b"]
    expected = {("a", "b"): smallest, ("a", "c"): max(smallest, 2 * raw["a", "c"]), ("b", "c"): raw["b", "c"]}
    expected["b", "c"] = max(expected["a", "c"], expected["b", "c"])
    assert {pair: d.p for pair, d in found.items()} == pytest.approx(expected)
    assert {pair: d.mean for pair, d in found.items()} == pytest.approx({("a", "b"): 2, ("b", "c"): 1, ("a", "c"): 3})


def test_equal_accuracies_do_not_differ() -> None:
    same = torch.tensor([0.5, 0.75, 1.0])
    (pair,) = comparison.differences({"a": same, "b": same.clone()})
    assert (pair.mean, pair.p) == (0, 1)
    assert comparison.differences({"a": same}) == []
