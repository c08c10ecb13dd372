"""examples/sinusoid.py: metalib on a loss and a network of one's own."""

from pathlib import Path

import pytest
import torch

from examples import sinusoid


@pytest.mark.parametrize("name", ["maml", "imaml"])
def test_learners_adapt_to_sines(name: str) -> None:
    """A hundred meta-steps, and inner steps bring the query loss down; from the initial weights they hardly do."""
    learner, params = sinusoid.meta_train(name, meta_steps=100)
    tasks = sinusoid.sines(200)
    seen: list[dict[str, torch.Tensor]] = []
    learner.adapt(sinusoid.loss, params, tasks.support_x, tasks.support_y, seen.append)
    before, after = (sinusoid.loss(weights, tasks.query_x, tasks.query_y).mean().item() for weights in (seen[0], seen[-1]))
    assert after < 0.9 * before


def test_it_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinusoid.main(str(tmp_path / "sines.png"), meta_steps=1)
    assert (tmp_path / "sines.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("query loss") == len(sinusoid.LEARNERS)
