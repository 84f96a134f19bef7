"""Ctrl-C reaches the program wherever it comes."""

import signal
import sys
import threading
import time
import weakref

import pytest

from paragraph_ocr import signals


class Anything:
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_callback_of_the_collector_is_not_lost(number):
    taken = []

    def handle(which):
        taken.append(which)
        raise KeyboardInterrupt(which.name)

    def call_back(_):
        signal.raise_signal(number)  # handled here, whence Python lets no exception out
        time.sleep(0)

    before = [sys.unraisablehook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match=number.name), signals.taken_by(handle):
        one = Anything()
        reference = weakref.ref(one, call_back)
        del one
        assert reference() is None
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert taken == [number, number]
    assert before == [
        sys.unraisablehook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ]  # fmt: skip


def test_a_handler_that_raises_nothing_is_called_once_and_can_be_taken_back():
    taken = []
    with signals.taken_by(taken.append) as take_back:
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as another library's would
        signal.raise_signal(signal.SIGTERM)
        take_back()
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
    assert taken == [signal.SIGTERM, signal.SIGINT]


def test_other_exceptions_that_cannot_be_raised_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def call_back(_):
        raise ValueError("of the callback")

    with signals.taken_by(lambda which: None):
        one = Anything()
        reference = weakref.ref(one, call_back)
        del one
    assert reference() is None
    assert [str(one.exc_value) for one in told] == ["of the callback"]


def test_outside_the_main_thread_nothing_is_taken():
    before, during = signal.getsignal(signal.SIGINT), []

    def work():
        with signals.taken_by(lambda which: None) as take_back:
            take_back()
            during.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [before]
