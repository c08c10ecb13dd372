"""A step that takes its time in launching kernels, recorded as a CUDA graph and launched as a whole."""

import warnings
from collections.abc import Callable

import torch


def captured(step: Callable[[], None], generators: list[torch.Generator], plain_calls: int = 3) -> Callable[[], None]:
    """`step` as a CUDA graph: recorded once, then launched as a whole, because its kernels are shorter than their launches.

    The first calls are plain ones, on a stream of their own, as recording wants it (pytorch.org/docs, "CUDA semantics"); they
    choose the convolutions' algorithms, and make what is kept from step to step. Where a step cannot be recorded, a warning
    says why, and plain calls go on.
    """
    stream, calls = torch.cuda.Stream(), 0
    replay: Callable[[], None] | None = None

    def plain() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)

    def call() -> None:
        nonlocal calls, replay
        calls += 1
        if calls <= plain_calls:
            return plain()
        if replay is None:
            replay = _record(step, generators, stream) or plain
        replay()

    return call


def _record(
    step: Callable[[], None], generators: list[torch.Generator], stream: torch.cuda.Stream
) -> Callable[[], None] | None:
    graph = torch.cuda.CUDAGraph()
    states = [generator.get_state() for generator in generators]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            if hasattr(graph, "register_generator_state"):  # newer versions of PyTorch register generators themselves
                for generator in generators:
                    graph.register_generator_state(generator)  # each launch draws on from where the last one left
        # the outer context makes the present stream current again, whatever a failing capture leaves
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
            step()  # is recorded, not run
    except RuntimeError as error:
        torch.cuda.synchronize()
        graph.reset()
        for generator, state in zip(generators, states, strict=True):
            fresh = torch.Generator(generator.device)  # a failed capture may leave the old state marked as of a graph
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh)
        # leaving torch.cuda.graph after an error raises another one, which knows nothing but that there was one
        reason = str(error.__context__ or error).partition("\n")[0]
        warnings.warn(f"no CUDA graph of the meta-step, which runs kernel by kernel: {reason}", stacklevel=2)
        return None
    return graph.replay
