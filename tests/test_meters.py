"""What a call takes, against known sizes."""

import time

import pytest
import torch

from metalib import meters

CPU = torch.device("cpu")


def test_the_peak_of_a_call_and_its_time() -> None:
    """64 MiB that are there together and gone afterwards. Seen failing with `before` taken after the call."""

    def call() -> None:
        parts = [torch.ones(2**22) for _ in range(4)]  # of 16 MiB each
        time.sleep(0.02)
        del parts

    found = meters.measure(call, CPU, repeats=3)
    assert found.bytes == pytest.approx(4 * 2**24, rel=0.1)
    assert 0.02 <= found.seconds < 2
