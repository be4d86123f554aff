"""Fixtures of the tests of checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Operations this small lose time to more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def failing() -> Callable[[nn.Module], None]:
    """Make a module raise at its next call, and at none after it."""

    def arm(module: nn.Module) -> None:
        def fail(*_: object) -> None:
            handle.remove()
            raise ZeroDivisionError("planted")

        handle = module.register_forward_pre_hook(fail)

    return arm
