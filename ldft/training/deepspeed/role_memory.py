"""The host memory of a rank's offloaded tensors: its arenas, and what the row says of every role."""

from __future__ import annotations

from typing import Any

import torch

from ldft.config import Device, Pinning
from ldft.memory.arenas import Arenas, span
from ldft.memory.policy import process_policy
from ldft.preflight.resolved import Resolved
from ldft.training.deepspeed import audit, roles
from ldft.training.deepspeed.roles import DMA_ROLES, RoleTensor


def arenas_of(run: Resolved, rank: int) -> Arenas | None:
    """The rank's arenas, empty so far; None where DeepSpeed's tensors are left to DeepSpeed."""
    if not run.uses_arenas:
        return None
    config = run.config
    exact = config.memory.pinning is Pinning.exact and config.launch.device is Device.cuda
    return Arenas(run.placements[rank], pinned=DMA_ROLES if exact else ())


def seconds(arenas: Arenas | None) -> dict[str, float]:
    """Parts of the initialisation that arenas took, as the row names them."""
    reports = [] if arenas is None else arenas.reports()
    placed_s = sum(report.place_s + report.verify_s + report.register_s for report in reports)
    return {"init_placement_s": placed_s, "init_first_touch_s": sum(report.touch_s for report in reports)}


def pinned(run: Resolved, arenas: Arenas | None) -> bool:
    """Whether offloaded tensors that DMA touches are pinned, by us or by DeepSpeed."""
    if arenas is None:
        return any(run.zero.get(name, {}).get("pin_memory", False) for name in ("offload_param", "offload_optimizer"))
    return any(report.pinned for report in arenas.reports())


def tensors(engine: Any, activations: list[torch.Tensor]) -> list[RoleTensor]:
    """Every tensor with a role. activations: where layer inputs wait, which DeepSpeed knows nothing of."""
    blocks = [RoleTensor("activations", f"layer inputs [{i}]", block) for i, block in enumerate(activations)]
    return [*roles.tensors(engine), *blocks]


def addresses(found: list[RoleTensor]) -> dict[str, list[tuple[str, int, int]]]:
    """Role -> (name, address, bytes) of each owner: for a reader outside this process."""
    by_role: dict[str, list[tuple[str, int, int]]] = {}
    for item in found:
        if item.owner and item.tensor.numel():
            start, end = span(item.tensor)
            by_role.setdefault(item.role, []).append((item.name, start, end - start))
    return by_role


def report(found: list[RoleTensor], arenas: Arenas | None) -> dict[str, Any]:
    """For the rank's report: each role by node. Raises AuditError."""
    measured = [
        {
            "role": role.role,
            "bytes": role.bytes,
            "pages": {str(node): count for node, count in role.pages.items()},
            "requested": None if role.requested is None else {str(n): s for n, s in role.requested.items()},
        }
        for role in audit.measure(found, arenas, process_policy().shares())
    ]
    methods = {report.method for report in arenas.reports()} if arenas else set()
    return {"roles": measured, "role_methods": sorted(methods)}
