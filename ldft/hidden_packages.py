"""Packages that a library imports only in case they are there, and that take long to load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Within the block the package cannot be imported, as if it were not installed; unless it is loaded already."""
    finders: list[Any] = sys.meta_path
    finder = _Without(package)
    finders.insert(0, finder)
    try:
        yield
    finally:
        finders.remove(finder)


class _Without:
    """In sys.meta_path. None in sys.modules would not do: compiled modules take it for the package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self._package:
            raise ModuleNotFoundError(name)
