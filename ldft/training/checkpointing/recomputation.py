"""What a recomputation tells the modules that it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_state = threading.local()


@contextmanager
def last_layer() -> Iterator[None]:
    """Around the last layer of a recomputed group: what the layer returns is read by nobody."""
    _state.last = True
    try:
        yield
    finally:
        _state.last = False


def is_last_layer() -> bool:
    """Whether this thread is inside `last_layer`."""
    return getattr(_state, "last", False)
