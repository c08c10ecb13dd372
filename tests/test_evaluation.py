"""Evaluation in chunks. The two protocols are tested in test_conv4.py."""

import torch

from metalib import evaluation
from metalib.data import tasks
from metalib.models.conv4 import Conv4
from metalib.randomness import generator
from tests import problems


def test_the_chunk_size_changes_nothing() -> None:
    net = Conv4(way=3, image_size=16, filters=4)
    images = (torch.rand(12, 6, 16, 16, generator=generator(0, "images")) < 0.2).to(torch.uint8) * 255
    drawn = tasks.draw(7, torch.arange(12), way=3, images=3, drawers=6, rotations="tasks", generators=[generator(0, "tasks")])
    params, learner = net.init(generator(0, "weights")), problems.build("fomaml", inner_steps=2)
    whole = evaluation.evaluate(learner, net, params, images, drawn, shot=1, chunk=7)
    parts = evaluation.evaluate(learner, net, params, images, drawn, shot=1, chunk=2)
    assert whole.transductive.shape == (3, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    last = evaluation.evaluate(learner, net, params, images, drawn, shot=1, every_step=False)
    assert all(torch.equal(a[-1:], b) for a, b in zip(whole, last, strict=True))
