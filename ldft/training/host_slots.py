"""Host memory for what waits for the backward pass: one arena, or few, cut into equal slots."""

from __future__ import annotations

import torch

from ldft.memory.allocator import REGISTER_CHUNK, allocate
from ldft.memory.policy import HostMemoryError, Placement

ALIGNMENT = 64


def arenas(
    count: int, bytes_each: int, placement: Placement | None, *, pin: bool, what: str, less: str
) -> list[torch.Tensor]:
    """Tensors of bytes whose rows are the slots, `count` in all; empty if none are needed.

    placement: None: wherever the process allocates. what: waits there. less: what takes less, beside a shorter seq_len. Raises
    HostMemoryError, one line with both.
    """
    stride = aligned(bytes_each)
    # A copy must lie within one registration.
    most = max(1, REGISTER_CHUNK // stride) if pin else max(1, count)
    made = []
    try:
        for first in range(0, count, most):
            shape = (min(most, count - first), stride)
            made.append(allocate(shape, torch.uint8, placement or Placement(), pin=pin))
    except HostMemoryError as error:
        raise HostMemoryError(
            f"{what}, {count * stride / 2**30:.2f} GiB, in host memory: {error}; a shorter seq_len{less} takes less"
        ) from error
    return made


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, flat."""
    return tensor.view(-1).view(torch.uint8)
