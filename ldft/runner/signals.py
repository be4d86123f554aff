"""Stop signals: SIGINT (Ctrl-C), SIGTERM, SIGHUP, and SIGUSR2, which batch systems are told to send before a job's time limit.

While ranks run, a signal raises Stopped, so that they are ended and the row gets status interrupted. While ranks are being started
or ended, and between the cells of a sweep, the signal is only noted: no rank is lost half-way, and the next step does not begin.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
_noted: str | None = None
_depth = 0


class Stopped(BaseException):
    """A stop signal arrived. Not an Exception, so that only its own handler catches it."""

    def __init__(self, name: str) -> None:
        self.name = name


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def noted() -> str | None:
    """Name of the stop signal that was noted, if any."""
    return _noted


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = signal.Signals(number).name


def note() -> None:
    """From here on, a signal is only noted, until `ignore`."""
    for number in SIGNALS:
        signal.signal(number, _note)


def ignore() -> None:
    """From here on, signals do nothing: the process ends by itself, and says how."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def noting() -> Iterator[None]:
    """Within the context, a signal is only noted; see `noted`. The contexts of runs are nested in their sweep's."""
    global _depth, _noted
    if _depth == 0:
        _noted = None
    _depth += 1
    try:
        with _handled_by(_note):
            yield
    finally:
        _depth -= 1


@contextmanager
def raising() -> Iterator[None]:
    """Within the context, a signal raises Stopped, but only once, so that a second one does not interrupt ending the ranks and
    writing the row."""

    def stop(number: int, frame: FrameType | None) -> None:
        global _noted
        ignore()
        _noted = signal.Signals(number).name
        raise Stopped(_noted)

    with _handled_by(stop):
        if _noted:
            raise Stopped(_noted)
        yield
