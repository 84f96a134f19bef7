"""Ctrl-C and SIGTERM, taken by a handler whose exception is not lost."""

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)

_AGAIN_AFTER = 0.02  # s


@contextmanager
def taken_by(handle: Callable[[signal.Signals], None]) -> Iterator[Callable[[], None]]:
    """Have `handle` called at each of them, within; give what takes them back from another handler.

    What it raises goes where any exception would go. But Python lets none out of a callback of the
    garbage collector, such as h5py's at each object that goes, and would only print it: then `handle` is
    called again a moment later. Outside the main thread nothing is taken.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    last: list[signal.Signals] = []

    def take(number: int, frame: object) -> None:
        last[:] = [signal.Signals(number)]
        handle(last[0])

    def take_all() -> None:
        for number in _ENDING:
            signal.signal(number, take)

    def not_lost(unraisable: Any) -> None:
        if last and isinstance(unraisable.exc_value, KeyboardInterrupt):
            threading.Timer(_AGAIN_AFTER, _thread.interrupt_main, last).start()
        else:
            before_hook(unraisable)

    before = [signal.getsignal(number) for number in _ENDING]
    before_hook, sys.unraisablehook = sys.unraisablehook, not_lost
    take_all()
    try:
        yield take_all
    finally:
        sys.unraisablehook = before_hook
        for number, handler in zip(_ENDING, before, strict=True):
            signal.signal(number, handler)
