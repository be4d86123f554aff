"""Which placement each role of tensors gets, rank by rank. Without torch: the parent asks before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def assign(config: Config, topology: Topology) -> list[dict[str, Placement]]:
    """Role -> resolved placement, one dict a rank. Kind default: wherever the policy of the process puts it.

    Raises PlacementError, which names numa.roles.<role>, where a placement does not suit the machine.
    """
    asked = config.numa.roles.placements()
    by_role = {
        role: asked[role].resolve(topology, f"numa.roles.{role}") if role in asked else Placement() for role in ROLES
    }
    return [dict(by_role) for _ in range(config.launch.num_ranks)]
