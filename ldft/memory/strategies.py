"""Which placement each role of tensors gets, rank by rank. Without torch: the parent asks before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ldft.memory.planner import DoesNotFit, reduced
from ldft.memory.policy import Placement
from ldft.memory.topology import Topology

if TYPE_CHECKING:
    from ldft.config import Config

ROLES = (
    "master_weights",
    "master_gradients",
    "momentum",
    "variance",
    "compute_weights",
    "compute_gradients",
    "activations",
)
# Most latency-critical first: what the optimizer step streams most of, then what the GPU alone touches (the paper's order).
PRIORITY = (
    "momentum",
    "variance",
    "master_gradients",
    "master_weights",
    "compute_weights",
    "activations",
    "compute_gradients",
)
# The allocator's largest weight: the finest split.
_FINEST = 1 << 20

Weights = dict[str, dict[int, int]]
"""Role -> node -> integer weight."""


def greedy(
    sizes: Mapping[str, float],
    local: Sequence[int],
    cxl: Sequence[int],
    local_budget: float,
    cxl_budget: float = float("inf"),
) -> Weights:
    """The paper's placement: by PRIORITY into local memory until its budget is full, the rest into CXL; evenly within a set.

    The role that does not fit as a whole is split: what is left of the budget locally, not a byte more (to one part in 2^20, and
    never above). sizes and budgets in bytes, all ranks together. Raises DoesNotFit where the CXL budget is exceeded.
    """
    weights: Weights = {}
    left, beyond = local_budget, 0.0
    for role in sorted(sizes, key=_rank):
        size = sizes[role]
        share = min(1.0, left / size) if size > 0 and cxl else 1.0
        # Of _FINEST parts; those of each node of a set are the same, so that a set of several is even.
        near = int(share * _FINEST)
        far = _FINEST - near
        scale = max(1, len(local)) * max(1, len(cxl))
        of = dict.fromkeys(local, near * scale // max(1, len(local)))
        of |= dict.fromkeys(cxl, far * scale // max(1, len(cxl)))
        weights[role] = reduced(of)
        left = left - size if far == 0 else 0.0
        beyond += size * far / _FINEST
    if beyond > cxl_budget or left < 0:
        raise DoesNotFit(
            f"the roles need {sum(sizes.values()) / 2**30:.1f} GiB, the budgets give {(local_budget + cxl_budget) / 2**30:.1f} GiB"
        )
    return weights


def _rank(role: str) -> int:
    return PRIORITY.index(role) if role in PRIORITY else len(PRIORITY)


def assign(config: Config, topology: Topology) -> list[dict[str, Placement]]:
    """Role -> resolved placement, one dict a rank. Kind default: wherever the policy of the process puts it.

    Raises PlacementError, which names numa.roles.<role>, where a placement does not suit the machine.
    """
    asked = config.numa.roles.placements()
    by_role = {
        role: asked[role].resolve(topology, f"numa.roles.{role}") if role in asked else Placement() for role in ROLES
    }
    return [dict(by_role) for _ in range(config.launch.num_ranks)]
