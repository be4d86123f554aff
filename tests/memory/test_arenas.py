"""Slots of an arena: none of a pinned one lies across two CUDA registrations, since a copy of it would fail."""

from __future__ import annotations

import pytest
import torch

from ldft.memory import allocator
from ldft.memory.arenas import Arena, Want, span
from ldft.memory.policy import Placement

CHUNK = 1 << 20


@pytest.mark.parametrize("pin", [True, False])
def test_a_pinned_slot_lies_in_one_registration(pin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "REGISTER_CHUNK", CHUNK)
    monkeypatch.setattr(allocator, "_warned", True)
    arena = Arena(role="master_gradients", placement=Placement(), pin=pin)
    wants = [
        Want(f"slot {i}", numel, torch.float32) for i, numel in enumerate([200_000, 62_144, 1, 262_144, 262_145, 7])
    ]
    arena.lay_out(wants)
    arena.lay_out(wants)  # all are there
    assert sum(block.numel() for block in arena.blocks) == sum(want.padded_bytes for want in wants)
    assert len(arena.blocks) == (5 if pin else 1)
    starts = [span(block)[0] for block in arena.blocks]
    for want in wants:
        slot = arena.slots[want.name]
        first, last = span(slot)
        assert arena.holds(slot) and (slot == 0).all()
        base = max(start for start in starts if start <= first)
        # Larger than a registration is what no layout helps.
        assert not pin or slot.nbytes > CHUNK or (first - base) // CHUNK == (last - 1 - base) // CHUNK
