"""Lanes that play the worst device that is still allowed: what may go wrong on a GPU's streams goes wrong here, every time.

A copy runs as late as its order permits: not before somebody waits for it, or for a later one of its lane. Its source must be
alive then (the memory of a freed input belongs to somebody else by that time), and it copies what the source holds by then. Its
target is poisoned when it begins: whoever still reads the old content, or reads the new one without waiting, finds that.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch

from ldft.training.lanes import Lane

POISON = 0xFF  # as bytes of a float: NaN


@dataclass(eq=False)
class Copy:
    lane: Lane
    target: torch.Tensor
    source: weakref.ref
    """To the storage: a view of it is no reason for an allocator to keep it."""
    bytes: tuple[int, int]
    slot: int
    """Address of the side in host memory."""


@dataclass
class LazyLanes:
    pending: list[Copy] = field(default_factory=list)
    log: list[tuple[Lane, int, int]] = field(default_factory=list)
    """Lane, address of the source, address of the target, in the order in which copies were begun."""

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> Copy:
        target.fill_(POISON)
        storage = source.untyped_storage()
        slot = (target if lane is Lane.to_host else source).data_ptr()
        copy = Copy(lane, target, weakref.ref(storage), (source.storage_offset(), source.numel()), slot)
        self.pending.append(copy)
        self.log.append((lane, source.data_ptr(), target.data_ptr()))
        return copy

    def wait(self, end: Copy) -> None:
        for copy in list(self.pending):
            if copy.lane is end.lane:
                self._run(copy)
            if copy is end:
                break

    def _run(self, copy: Copy) -> None:
        self.pending.remove(copy)
        storage = copy.source()
        assert storage is not None, "the source was freed before its copy"
        start, size = copy.bytes
        copy.target.copy_(torch.empty(0, dtype=torch.uint8).set_(storage, start, (size,)))
