"""CUDA graphs that share no memory with what may be freed while they live."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
