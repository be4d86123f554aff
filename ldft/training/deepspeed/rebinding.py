"""Move tensors of a live DeepSpeed engine into their arenas, with contents and views, one tensor at a time.

DeepSpeed is not patched: a tensor object keeps its identity and gets new memory (`tensor.data = ...`), as when DeepSpeed itself
offloads states.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ldft.memory.arenas import Arena, Arenas, Want, alias, piece, span
from ldft.training.deepspeed import audit, roles
from ldft.training.deepspeed.roles import RoleTensor


def settle(engine: Any, arenas: Arenas) -> int:
    """Move every tensor with a role into its arena, including moments, which stock DeepSpeed allocates in the first step.

    Call it after `deepspeed.initialize`. Returns the bytes moved. Raises HostMemoryError.
    """
    moved = rebind(engine, arenas)
    prefill(engine, arenas)
    _prefill_gradients(engine.optimizer, arenas)
    arenas.moved_bytes += moved
    if moved:
        # Return memory that the C allocator keeps for reuse.
        ctypes.CDLL(None).malloc_trim(0)
    return moved


def replace_after_load(engine: Any, arenas: Arenas) -> int:
    """Like settle, after `engine.load_checkpoint`, which puts the moments into new tensors. Returns the bytes moved. Raises
    HostMemoryError, and AuditError for tensors that are still misplaced."""
    moved = settle(engine, arenas)
    audit.check([*roles.tensors(engine)], arenas)
    return moved


def rebind(engine: Any, arenas: Arenas) -> int:
    """Move misplaced tensors, role by role and tensor by tensor, so that at most one role exists twice at any time. Returns the
    bytes moved."""
    moved = 0
    found = list(roles.tensors(engine))
    for role in dict.fromkeys(item.role for item in found):
        arena = arenas.of(role)
        mine = [item for item in found if item.role == role and item.tensor.numel()]
        owners = [item for item in mine if item.owner and not _in_its_slot(arena.slots.get(item.name), item.tensor)]
        owners = [item for item in owners if not _adopted(arena, item)]
        arena.spare = None
        arena.lay_out(Want(item.name, item.tensor.numel(), item.tensor.dtype) for item in owners)
        views = [item for item in mine if not item.owner]
        for item in owners:
            _move(item, arena.slots[item.name], views)
            moved += item.tensor.numel() * item.tensor.element_size()
    return moved


def prefill(engine: Any, arenas: Arenas) -> None:
    """Create zeroed moments in their arenas, as the optimizer would in its first step."""
    masters = [item for item in roles.tensors(engine) if item.role == "master_weights" and item.owner]
    if not masters:
        return
    optimizer = engine.optimizer.optimizer
    fresh = [item for item in masters if not optimizer.state.get(item.tensor)]
    for key in roles.moments_of(optimizer):
        arena = arenas.of(roles.MOMENTS[key])
        wants = {
            item.name: Want(f"{item.name}.{key}", item.tensor.numel(), roles.moment_type(optimizer, item.tensor))
            for item in fresh
        }
        arena.lay_out(wants.values())
        for item in fresh:
            state = optimizer.state[item.tensor]
            state.setdefault("step", 0)
            state[key] = alias(arena.slots[wants[item.name].name])


def _prefill_gradients(optimizer: Any, arenas: Arenas) -> None:
    """Create the buffers in which ZeRO-1/2 accumulates gradients, which it would allocate one by one in the first backward pass."""
    missing = roles.missing_gradients(optimizer)
    arena = arenas.of("compute_gradients")
    arena.lay_out(Want(roles.accumulated_name(i), numel, dtype) for i, (numel, dtype) in missing.items())
    for i in missing:
        optimizer.accumulated_grads_in_cpu[i] = alias(arena.slots[roles.accumulated_name(i)])


@torch.no_grad()
def _move(item: RoleTensor, slot: torch.Tensor, views: list[RoleTensor]) -> None:
    start, end = span(item.tensor)
    slot.copy_(item.tensor.detach().view(-1))
    for view in views:
        offset = view.tensor.data_ptr() - start
        if 0 <= offset < end - start:
            bytes_of = slot.view(torch.uint8)
            part = piece(bytes_of, offset, view.tensor.numel(), view.tensor.dtype)
            view.tensor.data = part.view(view.tensor.shape)
    item.tensor.data = alias(slot).view(item.tensor.shape)


def _adopted(arena: Arena, item: RoleTensor) -> bool:
    """Whether a tensor is in the spare block, where it may stay."""
    if arena.spare is None:
        return False
    (first, last), (start, end) = span(arena.spare), span(item.tensor)
    if not first <= start < end <= last:
        return False
    arena.adopt(arena.spare, item.name, piece(arena.spare, start - first, item.tensor.numel(), item.tensor.dtype))
    return True


def _in_its_slot(slot: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return slot is not None and span(slot) == span(tensor)
