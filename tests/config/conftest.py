"""The command line in this process: quick, and its parts can be replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Done

CLI = Callable[..., Done]


@pytest.fixture
def ldft(here: CLI) -> CLI:
    """In this folder no command starts a rank."""
    return here
