"""What can be said of CUDA graphs without a GPU; tests/test_gpu.py has the rest."""

import contextlib

import pytest
import torch

from metalib.cuda_graph import Captured


def test_a_failed_recording_names_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving `torch.cuda.graph` hides the step's error behind its own, as CUDA's does; seen failing with that one."""

    class Graph(contextlib.AbstractContextManager[None]):
        def __init__(self, *_: object, **__: object) -> None: ...

        def reset(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def step() -> None:
        raise RuntimeError("a look at a value\nCompile with ...")

    for name in ("CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Graph)
    for name in ("synchronize", "current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    call = Captured(step, [])
    with pytest.warns(UserWarning, match=r"refused: a look at a value \(test_cuda_graph.py, line \d+: raise RuntimeError"):
        assert call._record() is None
    assert call.outcome.startswith("refused: a look at a value")
