"""A step that takes its time in launching kernels, recorded as a CUDA graph and launched as a whole."""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch


class Captured:
    """`step` as a CUDA graph: recorded once, then launched as a whole, because its kernels are shorter than their launches.

    The first calls are plain ones, on a stream of their own, as recording wants it (pytorch.org/docs, "CUDA semantics"); they
    choose the convolutions' algorithms, and make what is kept from step to step. Where a step cannot be recorded, a warning
    says why, and plain calls go on.
    """

    def __init__(self, step: Callable[[], None], generators: list[torch.Generator], plain_calls: int = 3):
        self.step, self.generators, self.plain_calls = step, generators, plain_calls
        self.stream = torch.cuda.Stream()
        self.replay: Callable[[], None] | None = None
        self.outcome = "not reached"  # then "recorded", or what stood in the way

    def __call__(self) -> None:
        if self.replay:
            self.replay()
        elif self.plain_calls > 0:
            self.plain_calls -= 1
            self._plain()
        else:
            self.replay = self._record() or self._plain
            self.replay()

    def _plain(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self) -> Callable[[], None] | None:
        graph = torch.cuda.CUDAGraph()
        states = [generator.get_state() for generator in self.generators]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                if hasattr(graph, "register_generator_state"):  # newer versions of PyTorch register generators themselves
                    for generator in self.generators:
                        graph.register_generator_state(generator)  # each launch draws on from where the last one left
            # the outer context makes the present stream current again, whatever a failing capture leaves
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=self.stream):
                self.step()  # is recorded, not run
        except RuntimeError as error:
            torch.cuda.synchronize()
            graph.reset()
            for generator, state in zip(self.generators, states, strict=True):
                fresh = torch.Generator(generator.device)  # a failed capture may leave the old state marked as of a graph
                fresh.set_state(state)
                generator.graphsafe_set_state(fresh)
            self.outcome = f"refused: {cause(error)}"
            warnings.warn(f"no CUDA graph of the meta-step, which runs kernel by kernel; {self.outcome}", stacklevel=3)
            return None
        self.outcome = "recorded"
        return graph.replay


def cause(error: BaseException) -> str:
    """What stopped a recording, and the line of the step where it did."""
    # leaving torch.cuda.graph after an error raises another one, which knows nothing but that there was one
    first = error.__context__ or error
    where = traceback.extract_tb(first.__traceback__)[-1]
    return f"{str(first).partition(chr(10))[0]} ({Path(where.filename).name}, line {where.lineno}: {where.line})"
