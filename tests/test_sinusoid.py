"""examples/sinusoid.py at a small size."""

from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
from examples import sinusoid


@pytest.mark.parametrize("name", sinusoid.LEARNERS)
def test_every_learner_of_the_example_learns(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen failing with a score of the loss instead of its negative."""
    sinusoid.main(name, meta_steps=30, picture=str(tmp_path / "curves.png"))
    errors = [float(line.split("error ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 5 and errors[-1] < errors[0]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
