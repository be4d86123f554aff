"""Copies concurrent with computation: one lane from the device to the host, one back.

A copy begins after all work submitted to the compute stream so far. So it is safe to make the compute stream wait for a copy before
freeing or overwriting its source and before reading its target; no allocator needs to know about streams.

Host memory comes from one arena, or a few, divided into equal slots.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

import torch

from ldft.memory.allocator import REGISTER_CHUNK, allocate
from ldft.memory.policy import HostMemoryError, Placement

ALIGNMENT = 64


class Lane(IntEnum):
    """Each direction has its own copy engine."""

    to_host = 0
    to_device = 1


class Lanes(Protocol):
    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin a copy after all work submitted to the compute stream so far; returns its end, for `wait`."""

    def wait(self, end: Any) -> None:
        """Make all later work on the compute stream wait for that end."""


class CudaLanes:
    """Two side streams. The compute stream is the calling thread's current one; autograd's threads use the forward pass's
    stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in Lane]

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        stream = self._streams[lane]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        end: torch.cuda.Event = stream.record_event()
        return end

    def wait(self, end: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(end)


class NoLanes:
    """A device without streams: a copy is done when the call returns."""

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, end: None) -> None:
        pass


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else NoLanes()


def arenas(
    count: int, bytes_each: int, placement: Placement | None, *, pin: bool, what: str, less: str
) -> list[torch.Tensor]:
    """Byte tensors whose rows are the slots, `count` in total; empty if none are needed.

    placement: None: the process policy. what: the contents, for errors. less: how to need less memory, besides a shorter seq_len.
    Raises HostMemoryError, one line with both.
    """
    stride = aligned(bytes_each)
    # A copy must stay within one registration.
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


class HostSlots:
    """Equal slots of host memory for tensors that leave the device, and the lanes to and from them.

    count: number of slots. bytes_each: bytes of the largest tensor. lanes: None: create new ones. The rest as for `arenas`.
    Raises HostMemoryError if the memory cannot be allocated.
    """

    def __init__(
        self,
        count: int,
        bytes_each: int,
        device: torch.device,
        placement: Placement | None,
        *,
        pin: bool,
        lanes: Lanes | None,
        what: str,
        less: str,
    ) -> None:
        self._device = device
        self._lanes = lanes or lanes_of(device)
        self._arenas = arenas(count, bytes_each, placement, pin=pin, what=what, less=less)
        self._rows: list[torch.Tensor] = [row for arena in self._arenas for row in arena]

    def host_tensors(self) -> list[torch.Tensor]:
        """The memory of all slots, for the audit by role."""
        return self._arenas


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, flat."""
    return tensor.view(-1).view(torch.uint8)
