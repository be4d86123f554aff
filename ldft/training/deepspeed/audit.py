"""Audits the live engine: every tensor with a role must be in its arena (checked by address), and every arena on its nodes (checked
by move_pages(2))."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldft.errors import LdftError
from ldft.memory.allocator import pages_by_node, report_of
from ldft.memory.arenas import Arena, Arenas, span
from ldft.memory.policy import NumaCallError
from ldft.training.deepspeed.roles import RoleTensor


class AuditError(LdftError):
    """A tensor is not where its role was placed. One line, with the tensor's name in DeepSpeed."""


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """One role on this rank."""

    role: str
    bytes: int
    """Bytes of its tensors, without padding."""
    pages: dict[int, int]
    """Node -> number of base pages that hold them. Empty: the kernel forbids the query, and no placement was requested."""
    requested: dict[int, float] | None
    """Node -> requested share; None: none requested."""


def check(found: Sequence[RoleTensor], arenas: Arenas) -> None:
    """Check that every tensor with a role is in its arena, and that no two owners share memory. Fast. Raises AuditError."""
    found = [item for item in found if item.tensor.numel()]
    for item in found:
        if not arenas.of(item.role).holds(item.tensor):
            raise AuditError(_miss(item, "is not in the arena of its role"))
    for role in dict.fromkeys(item.role for item in found):
        owners = sorted((item for item in found if item.role == role and item.owner), key=lambda i: i.tensor.data_ptr())
        for before, after in itertools.pairwise(owners):
            if span(after.tensor)[0] < span(before.tensor)[1]:
                raise AuditError(_miss(after, f"shares memory with {before.name}"))


def measure(
    found: Sequence[RoleTensor], arenas: Arenas | None, inherited: Mapping[int, float] | None
) -> list[RoleMemory]:
    """The current placement of each role. Raises AuditError if anything is misplaced.

    arenas: None for stock DeepSpeed's tensors, which ldft does not place. inherited: the process policy's shares by node, for roles
    without their own placement.
    """
    if arenas is not None:
        check(found, arenas)
    owners: dict[str, list[RoleTensor]] = {}
    for item in found:
        if item.owner and item.tensor.numel():
            owners.setdefault(item.role, []).append(item)
    measured = []
    for role, items in owners.items():
        size = sum(item.tensor.numel() * item.tensor.element_size() for item in items)
        if arenas is None:
            pages = _sum(_pages_now(item.tensor.detach()) for item in items)
            measured.append(RoleMemory(role, size, pages, None))
            continue
        arena = arenas.of(role)
        shares = arena.placement.shares() if arena.placement.kind != "default" else inherited
        measured.append(RoleMemory(role, size, _pages(arena, items), None if shares is None else dict(shares)))
    return measured


def _pages(arena: Arena, items: list[RoleTensor]) -> dict[int, int]:
    """Current pages of the whole arena by node. Raises AuditError if pages have left the nodes on which they were placed."""
    now = _sum(_pages_now(block) for block in arena.blocks)
    then = _sum(report_of(block).pages for block in arena.blocks if block.numel())
    gone = {node: count - then.get(node, 0) for node, count in now.items() if node >= 0 and count > then.get(node, 0)}
    if gone and arena.placement.kind != "default":
        where = ", ".join(f"{count} pages more on node {node}" for node, count in gone.items())
        raise AuditError(_miss(items[0], f"has left the nodes on which it was placed ({where})"))
    return now


def _pages_now(tensor: Any) -> dict[int, int]:
    """Empty if the kernel forbids the query. Arenas with their own placement were then refused when allocated."""
    try:
        return pages_by_node(tensor)
    except NumaCallError:
        return {}


def _sum(counts: Any) -> dict[int, int]:
    total: dict[int, int] = {}
    for one in counts:
        for node, count in one.items():
            total[node] = total.get(node, 0) + count
    return dict(sorted(total.items()))


def _miss(item: RoleTensor, what: str) -> str:
    size = item.tensor.numel() * item.tensor.element_size()
    return (
        f"{item.name} ({item.role}, {size / 2**20:.1f} MiB) {what}; nothing is measured. "
        "Use memory.pinning=torch for DeepSpeed's own allocation, and report this with the DeepSpeed version"
    )
