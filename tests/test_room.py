"""What studies share: pages from templates, and places for labels."""

import itertools

import jinja2
import pytest

from studies import room


def test_a_page_asks_for_every_value() -> None:
    with pytest.raises(jinja2.UndefinedError):
        room.render("meta_gradient_error", budget="quick")


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [1.0, 1.0, 1.1, 5.0], [2.0, 1.9, 1.8, 1.0, 0.9, 3.0]])
def test_labels_keep_apart_and_in_order(values: list[float]) -> None:
    """Seen failing with groups that are not merged again after they have grown."""
    places = room.spread(values, 0.5)
    by_value = [place for _, place in sorted(zip(values, places, strict=True))]
    assert all(after - before >= 0.5 - 1e-9 for before, after in itertools.pairwise(by_value))
    assert sum(places) == pytest.approx(sum(values))
    if min((abs(a - b) for a, b in itertools.combinations(values, 2)), default=1) >= 0.5:
        assert places == pytest.approx(values)


def test_labels_on_a_log_axis() -> None:
    assert room.spread([1.0, 1.0, 100.0], 4, log=True) == pytest.approx([0.5, 2, 100])
