"""What can be said of CUDA graphs without a GPU; tests/test_gpu.py has the rest."""

import pytest

from metalib.cuda_graph import cause


def test_a_recording_that_fails_names_the_operation() -> None:
    """PyTorch's first error is hidden behind the one that leaving the recording raises."""
    with pytest.raises(RuntimeError) as caught:
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("capture failed")
    assert cause(caught.value).startswith("operation not permitted (test_cuda_graph.py, line ")
    assert 'raise RuntimeError("operation' in cause(caught.value)
