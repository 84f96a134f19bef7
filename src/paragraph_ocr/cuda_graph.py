"""CUDA graphs that share no memory with what may be freed while they live."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, *, pool: Any = None) -> Iterator[None]:
    """Record what is done within.

    cuBLAS keeps a workspace for each stream, and all graphs are recorded on one stream: a graph would
    go on using that of an earlier one, whose memory Lightning frees at the end of a training. So each
    takes a workspace of its own, in its own pool, and leaves none behind. Other threads may go on using
    the card, which a loader does.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Recorded:
    """A function of tensors that is recorded for the shapes it is called with, and launched as one.

    On a CPU it is called as it is. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not all(tensor.is_cuda for tensor in tensors):
            return self._function(tensors)
        if self._graph is None or [t.shape for t in tensors] != [t.shape for t in self._inputs]:
            self._graph = self._record(tensors)
        torch._foreach_copy_(self._inputs, list(tensors))
        self._graph.replay()
        return self._outputs

    def _record(self, tensors: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [tensor.clone() for tensor in tensors]
        warm_up(lambda: self._function(self._inputs))
        graph = torch.cuda.CUDAGraph()
        with recording(graph):
            self._outputs = self._function(self._inputs)
        return graph


def warm_up(function: Callable[[], object]) -> None:
    """Call twice, on a stream of its own, what is to be recorded: it compiles, and libraries take memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
