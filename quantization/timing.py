"""Microseconds that GPU functions take, measured in a CUDA graph: without the time that launching them takes."""

import functools
from collections.abc import Callable, Sequence

import torch


def measure_us(functions: Sequence[Callable[[], object]], rounds: int = 4) -> float:
    """Microseconds per call: `functions` run one after the other in a CUDA graph, the best of `rounds` replays counts.

    Give each function weights of its own that add up to more than the L2 cache: then weights are read from memory, as in
    a model.
    """
    graph = record(functions)
    return min([replay_us(graph) for _ in range(rounds + 1)][1:]) / len(functions)


@torch.no_grad()
def record(functions: Sequence[Callable[[], object]]) -> "torch.cuda.CUDAGraph":
    """A CUDA graph of all functions, one after the other. They run once before, so that kernels are compiled."""
    for function in (functions[0], *functions):
        function()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_measuring_stream(torch.cuda.current_device())):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for function in functions:
                function()
        finally:
            graph.capture_end()
    return graph


def replay_us(graph: "torch.cuda.CUDAGraph") -> float:
    """Microseconds of one replay."""
    with torch.cuda.stream(_measuring_stream(torch.cuda.current_device())):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) * 1e3


@functools.cache
def _measuring_stream(device: int) -> torch.cuda.Stream:
    """One stream for all measurements on a device: libraries keep a workspace for every stream they have seen."""
    return torch.cuda.Stream(device)
