"""Work shared by processes, its results in order: spawned, stopped by Ctrl-C, gone with the parent."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 16  # items a task: a tenth of a second of rendering
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def in_order(work: Callable[[T], R], items: Sequence[T], *, num_workers: int) -> Iterator[R]:
    """Yield work(item) for each item, in order, a few tasks ahead of the consumer.

    Fewer than 2 workers, or a single chunk of items: in this process. Otherwise `work` must be
    picklable. When the consumer stops or fails, the workers end after the items in hand.
    """
    if num_workers < 2 or len(items) <= _CHUNK:
        yield from map(work, items)
        return
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    context = multiprocessing.get_context("spawn")  # the parent may hold threads of torch
    waiting: deque[Future[list[R]]] = deque()
    executor = ProcessPoolExecutor(min(num_workers, len(chunks)), context, _begin)
    try:
        with _one_thread_each():  # the first task starts all workers
            waiting.append(executor.submit(_work_through, work, chunks[0]))
        for chunk in chunks[1:]:
            waiting.append(executor.submit(_work_through, work, chunk))
            if len(waiting) > 4 * num_workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _work_through(work: Callable[[T], R], chunk: Sequence[T]) -> list[R]:
    return [work(item) for item in chunk]


def _begin() -> None:
    """Prepare a worker: one thread, deaf to Ctrl-C (the parent acts on it), gone with the parent."""
    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have processes started meanwhile inherit an environment in which BLAS keeps to one thread.

    A worker may import NumPy, with the main module, before `_begin` could say so; and as many
    threads as cores in each of as many workers make rendering ten times slower.
    """
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
