"""Arenas: all host memory of one role on one rank, placed and pinned together, handed out as named slots.

A slot is a plain tensor in the arena's memory. Slots start on cache lines, as torch's own tensors do, and are kept by name, so that
a tensor that DeepSpeed moved elsewhere can be returned to its slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ldft.memory import allocator
from ldft.memory.placing import Report
from ldft.memory.policy import HostMemoryError, Placement

# Bytes: a cache line, and the widest vector of any CPU.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Want:
    """A requested slot: its name, number of elements and dtype."""

    name: str
    numel: int
    dtype: torch.dtype

    @property
    def padded_bytes(self) -> int:
        return -(-self.numel * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(kw_only=True, slots=True)
class Arena:
    """Memory of one role. Usually one block; several if the role grew after the first, or exceeds what CUDA registers at once."""

    role: str
    placement: Placement
    pin: bool
    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    blocks: list[torch.Tensor] = field(default_factory=list)
    spare: torch.Tensor | None = None
    """A block that holds tensors not yet named; it joins the arena once one of them is adopted."""

    def lay_out(self, wants: Iterable[Want]) -> None:
        """Allocate a zeroed slot for each name that has none of that size and dtype yet: in one block, or in several if a pinned
        slot would otherwise cross two registrations (DeepSpeed may copy any part of a slot at once)."""
        group: list[Want] = []
        size = 0
        for want in (want for want in wants if not self._fits(want)):
            if group and self.pin and size + want.padded_bytes > allocator.REGISTER_CHUNK:
                self._add_block(group, size)
                group, size = [], 0
            group.append(want)
            size += want.padded_bytes
        if group:
            self._add_block(group, size)

    def _add_block(self, wants: list[Want], size: int) -> None:
        block = self.allocate(size)
        self.blocks.append(block)
        offset = 0
        for want in wants:
            self.slots[want.name] = piece(block, offset, want.numel, want.dtype)
            offset += want.padded_bytes

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes with this role's placement, not yet part of the arena. Raises HostMemoryError."""
        try:
            return allocator.allocate(size, torch.uint8, self.placement, pin=self.pin)
        except HostMemoryError as error:
            raise HostMemoryError(f"{self.role}: {error}") from error

    def adopt(self, block: torch.Tensor, name: str, slot: torch.Tensor) -> None:
        """Add a slot in a block that came from `allocate`."""
        if not any(known is block for known in self.blocks):
            self.blocks.append(block)
        self.slots[name] = slot

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all of a contiguous tensor lies in one of the blocks."""
        start, end = span(tensor)
        return any(first <= start and end <= last for first, last in map(span, self.blocks))

    def _fits(self, want: Want) -> bool:
        slot = self.slots.get(want.name)
        return slot is not None and slot.numel() == want.numel and slot.dtype == want.dtype

    def reports(self) -> list[Report]:
        """How each block was allocated."""
        return [allocator.report_of(block) for block in self.blocks if block.numel()]


class Arenas:
    """The arenas of one rank, each created when its role first needs memory."""

    def __init__(self, placements: Mapping[str, Placement], *, pinned: Iterable[str]) -> None:
        """pinned: the roles to register with CUDA."""
        self._placements, self._pinned = dict(placements), frozenset(pinned)
        self.by_role: dict[str, Arena] = {}
        self.moved_bytes = 0
        """Bytes first allocated elsewhere and then moved into arenas."""

    def of(self, role: str) -> Arena:
        """The arena of a role, created empty on first use."""
        if role not in self.by_role:
            self.by_role[role] = Arena(role=role, placement=self.placement_of(role), pin=role in self._pinned)
        return self.by_role[role]

    def placement_of(self, role: str) -> Placement:
        return self._placements.get(role, Placement())

    def reports(self) -> list[Report]:
        return [report for arena in self.by_role.values() for report in arena.reports()]


def piece(block: torch.Tensor, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over part of a block of bytes; autograd does not see it as a view, so it can be a leaf."""
    start = block.storage_offset() + offset
    assert start % dtype.itemsize == 0 and offset + numel * dtype.itemsize <= block.numel()
    return block.new_empty(0, dtype=dtype).set_(block.untyped_storage(), start // dtype.itemsize, (numel,), (1,))


def alias(slot: torch.Tensor) -> torch.Tensor:
    """Another tensor object over the same memory: replacing its storage leaves the slot unchanged."""
    # Made from the slot: torch's factory functions would use the default device under which the model is built.
    return slot.new_empty(0).set_(slot.untyped_storage(), slot.storage_offset(), slot.shape, slot.stride())


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a contiguous tensor and the one after its last byte."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()
