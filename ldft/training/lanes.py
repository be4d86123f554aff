"""Copies beside the computation: one lane from the device to the host, one back.

A copy begins once all work given to the compute stream so far is done. So whoever makes the compute stream wait for a copy
before it frees or overwrites the source, and before it reads the target, is safe; no allocator has to be told of any stream.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

import torch


class Lane(IntEnum):
    """Each direction has a copy engine of its own."""

    to_host = 0
    to_device = 1


class Lanes(Protocol):
    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin a copy, behind everything that the compute stream was given so far; returns its end, for `wait`."""

    def wait(self, end: Any) -> None:
        """What the compute stream is given from here on comes after that end."""


class CudaLanes:
    """Two side streams. The compute stream is the calling thread's current one; autograd gives its threads that of the forward."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in Lane]

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        stream = self._streams[lane]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()

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
