"""Lanes that play the worst device that is still allowed: what may go wrong on a GPU's streams goes wrong here, every time.

A copy runs as late as its order permits: not before somebody waits for it, or for a later one of its lane. Its source must be
alive then, and its target (what was freed belongs to somebody else by that time), and it copies what the source holds by then.
Its target is poisoned when it begins: whoever still reads the old content, or reads the new one without waiting, finds that.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch

from ldft.training.checkpointing.copies import Lane

POISON = 0xFF  # as bytes of a float: NaN


class Part:
    """Bytes of a tensor that somebody else must keep alive: a view held here is no reason for an allocator to keep them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._begin, self._size = int(tensor.storage_offset()), tensor.numel()

    def tensor(self, what: str) -> torch.Tensor:
        storage = self._storage()
        assert storage is not None, f"the {what} was freed before the copy"
        return torch.empty(0, dtype=torch.uint8).set_(storage, self._begin, (self._size,), (1,))


@dataclass(eq=False)
class Copy:
    lane: Lane
    target: Part
    source: Part
    slot: int
    """Address of the side in host memory."""


@dataclass
class LazyLanes:
    pending: list[Copy] = field(default_factory=list)
    log: list[tuple[Lane, int, int]] = field(default_factory=list)
    """Lane, address of the source, address of the target, in the order in which copies were begun."""

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> Copy:
        target.fill_(POISON)
        slot = (target if lane is Lane.to_host else source).data_ptr()
        copy = Copy(lane, Part(target), Part(source), slot)
        self.pending.append(copy)
        self.log.append((lane, source.data_ptr(), target.data_ptr()))
        return copy

    def wait(self, end: Copy) -> None:
        if end not in self.pending:
            return
        for copy in [one for one in self.pending if one.lane is end.lane]:
            self.pending.remove(copy)
            copy.target.tensor("target").copy_(copy.source.tensor("source"))
            if copy is end:
                break
