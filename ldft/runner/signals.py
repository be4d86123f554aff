"""Being told to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP.

While ranks work a signal raises, so that they are ended and the row says interrupted. While they are started or ended, and between
the cells of a sweep, it is noted: no rank is lost half-way, and what comes next does not begin.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_noted: str | None = None
_depth = 0


class Stopped(BaseException):
    """We were told to stop. No Exception: nothing but its own handler is to catch it."""

    def __init__(self, name: str) -> None:
        self.name = name


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def noted() -> str | None:
    """Name of the signal that told us to stop, if one did."""
    return _noted


@contextmanager
def noting() -> Iterator[None]:
    """A signal ends nothing by itself; `noted` tells of it. Contexts of a run lie within that of its sweep."""
    global _depth, _noted

    def note(number: int, frame: FrameType | None) -> None:
        global _noted
        _noted = signal.Signals(number).name

    if _depth == 0:
        _noted = None
    _depth += 1
    try:
        with _handled_by(note):
            yield
    finally:
        _depth -= 1


@contextmanager
def raising() -> Iterator[None]:
    """A signal raises Stopped, once: what follows (ending the ranks, the row) is not to be cut short by another."""

    def stop(number: int, frame: FrameType | None) -> None:
        global _noted
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        _noted = signal.Signals(number).name
        raise Stopped(_noted)

    with _handled_by(stop):
        if _noted:
            raise Stopped(_noted)
        yield
