"""The host memory of a rank's offloaded tensors: its arenas, and the report on every role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldft.config import Device, Pinning
from ldft.memory.allocator import report_of
from ldft.memory.arenas import Arenas, span
from ldft.memory.placing import Report
from ldft.memory.policy import process_policy
from ldft.preflight.resolved import Resolved
from ldft.training.deepspeed import audit, roles
from ldft.training.deepspeed.roles import DMA_ROLES, RoleTensor


def arenas_of(run: Resolved, rank: int) -> Arenas | None:
    """The rank's arenas, still empty; None if DeepSpeed allocates its own tensors."""
    if not run.uses_arenas:
        return None
    config = run.config
    exact = config.memory.pinning is Pinning.exact and config.launch.device is Device.cuda
    return Arenas(run.placements[rank % len(run.placements)], pinned=DMA_ROLES if exact else ())


def seconds(arenas: Arenas | None) -> dict[str, float]:
    """Seconds of initialisation spent on arenas, by the row's column names."""
    reports = [] if arenas is None else arenas.reports()
    placed_s = sum(report.place_s + report.verify_s + report.register_s for report in reports)
    return {"init_placement_s": placed_s, "init_first_touch_s": sum(report.touch_s for report in reports)}


def pinned(run: Resolved, arenas: Arenas | None) -> bool:
    """Whether offloaded tensors that DMA accesses are pinned, by ldft or by DeepSpeed."""
    if arenas is None:
        return any(run.zero.get(name, {}).get("pin_memory", False) for name in ("offload_param", "offload_optimizer"))
    return any(report.pinned for report in arenas.reports())


def tensors(engine: Any, activations: list[torch.Tensor]) -> list[RoleTensor]:
    """Every tensor with a role. activations: the memory for layer inputs, which DeepSpeed does not know."""
    blocks = [RoleTensor("activations", f"layer inputs [{i}]", block) for i, block in enumerate(activations)]
    return [*roles.tensors(engine), *blocks]


def so_far(arenas: Arenas | None, activations: list[torch.Tensor]) -> list[RoleTensor]:
    """The arenas' tensors before the engine exists."""
    by_role = arenas.by_role if arenas else {}
    slots = [RoleTensor(role, name, slot) for role, arena in by_role.items() for name, slot in arena.slots.items()]
    return [*slots, *(RoleTensor("activations", f"layer inputs [{i}]", t) for i, t in enumerate(activations))]


def at_work(found: list[RoleTensor]) -> dict[str, Any]:
    """For monitoring during the run: each role's bytes, by node as verified at allocation, and the pinned bytes.

    Pages are not queried again. Memory that ldft did not allocate (memory.pinning=torch) was never verified: nodes are None until
    the end of the run.
    """
    memory: dict[str, dict[str, Any]] = {}
    pinned = 0
    for role in dict.fromkeys(item.role for item in found):
        owners = [item.tensor for item in found if item.role == role and item.owner and item.tensor.numel()]
        regions: dict[int, Report | None] = {}
        for tensor in owners:
            regions.setdefault(tensor.untyped_storage().data_ptr(), _report_of(tensor))
        known = [report for report in regions.values() if report is not None]
        pages: dict[int, int] = {}
        for report in known if len(known) == len(regions) else ():
            for node, count in report.pages.items():
                pages[node] = pages.get(node, 0) + count
        pinned += sum(report.bytes_reserved for report in known if report.pinned)
        pinned += sum(t.nbytes for t in owners if _report_of(t) is None and t.is_pinned())
        memory[role] = _by_node(sum(t.nbytes for t in owners), pages)
    return {"role_memory": memory, "pinned_bytes": pinned}


def _report_of(tensor: torch.Tensor) -> Report | None:
    try:
        return report_of(tensor)
    except KeyError:  # torch's
        return None


def _by_node(size: int, pages: Mapping[int, int]) -> dict[str, Any]:
    """A role's bytes, split like its pages; nodes: None if unknown."""
    total = sum(pages.values())
    if not total:
        return {"bytes": size, "nodes": None}
    split = {node: size * count // total for node, count in pages.items()}
    split[max(split, key=lambda node: split[node])] += size - sum(split.values())  # the rounding remainder
    return {"bytes": size, "nodes": {str(node): part for node, part in split.items()}}


def addresses(found: list[RoleTensor]) -> dict[str, list[tuple[str, int, int]]]:
    """Role -> (name, address, bytes) of each owner, for readers outside this process."""
    by_role: dict[str, list[tuple[str, int, int]]] = {}
    for item in found:
        if item.owner and item.tensor.numel():
            start, end = span(item.tensor)
            by_role.setdefault(item.role, []).append((item.name, start, end - start))
    return by_role


def report(found: list[RoleTensor], arenas: Arenas | None) -> dict[str, Any]:
    """For the rank's report: each role by node. Raises AuditError."""
    found_now = audit.measure(found, arenas, process_policy().shares())
    measured = [
        {
            "role": role.role,
            "bytes": role.bytes,
            "pages": {str(node): count for node, count in role.pages.items()},
            "requested": None if role.requested is None else {str(n): s for n, s in role.requested.items()},
        }
        for role in found_now
    ]
    now = {role.role: _by_node(role.bytes, role.pages) for role in found_now}
    methods = {report.method for report in arenas.reports()} if arenas else set()
    return {"roles": measured, "role_methods": sorted(methods), "role_memory": now}
