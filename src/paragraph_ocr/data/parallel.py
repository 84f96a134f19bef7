"""Work shared by processes, its results in order: spawned, stopped by Ctrl-C, gone with the parent."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 16  # items a task: a tenth of a second of rendering
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Return how many cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    work: Callable[[T], R], items: Iterable[T], *, num_workers: int, chunk: int = _CHUNK
) -> Iterator[R]:
    """Yield work(item) for each item, in order, a few tasks of `chunk` items ahead of the consumer.

    Items are taken from their iterator no sooner. Fewer than 2 workers, or a single chunk of items:
    in this process. Otherwise `work` must be picklable. When the consumer stops or fails, the workers
    end after the items in hand.
    """
    chunks = batched(items, chunk)
    head = [*islice(chunks, 2)]
    if num_workers < 2 or len(head) < 2:
        for items_in_hand in chain(head, chunks):
            yield from map(work, items_in_hand)
        return
    context = multiprocessing.get_context("spawn")  # the parent may hold threads of torch
    waiting: deque[Future[list[R]]] = deque()
    executor = ProcessPoolExecutor(num_workers, context, _begin)
    try:
        with _one_thread_each():  # each of the first tasks starts a worker
            for items_in_hand in chain(head, islice(chunks, max(0, num_workers - len(head)))):
                waiting.append(executor.submit(_work_through, work, items_in_hand))
        for items_in_hand in chunks:
            waiting.append(executor.submit(_work_through, work, items_in_hand))
            if len(waiting) > 4 * num_workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items by lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := [*islice(iterator, size)]:
        yield batch


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
