"""The host-memory policy: on which NUMA nodes the run's bytes are put."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from ldft.errors import ConfigError
from ldft.memory import bandwidths
from ldft.memory.policy import Placement


class NumaKind(Enum):
    """default: the caller's policy. bind, preferred: these nodes first. interleave: evenly. weighted_interleave: by weight."""

    default = "default"
    bind = "bind"
    preferred = "preferred"
    interleave = "interleave"
    weighted_interleave = "weighted_interleave"


class NumaScope(Enum):
    """process: all memory of the ranks, as numactl would place it. roles: each group of offloaded tensors by itself."""

    process = "process"
    roles = "roles"


class NumaStrategy(Enum):
    """none: roles go where numa.roles says. local_only: all of them into local memory. naive_interleaving: all of them evenly over
    local memory and CXL. cxl_aware: by priority into local memory until its budget is full, the rest into CXL. striped: as
    cxl_aware, but layer inputs and 16-bit gradients of rank r on the CXL nodes in turn. optimal: the fastest by the cost model."""

    none = "none"
    local_only = "local_only"
    naive_interleaving = "naive_interleaving"
    cxl_aware = "cxl_aware"
    striped = "striped"
    optimal = "optimal"


@dataclass(kw_only=True, slots=True)
class RoleConfig:
    """Where the tensors of one role go; without anything they follow the rest of the policy."""

    kind: NumaKind = NumaKind.default
    """How pages are spread; default follows from the rest: weights weight them, one node binds, several interleave."""
    nodes: list[int] = field(default_factory=list)
    """Node numbers, e.g. [0,3]."""
    weights: list[int] = field(default_factory=list)
    """Pages a turn on each of the nodes, in their order, e.g. [4,1]; weights of several roles may differ."""

    @property
    def placement(self) -> Placement | None:
        """None where nothing was said about this role."""
        kind = self.kind.name
        if self.kind is NumaKind.default:
            if not self.nodes and not self.weights:
                return None
            kind = "weighted_interleave" if self.weights else "bind" if len(self.nodes) == 1 else "interleave"
        return Placement(kind=kind, nodes=tuple(self.nodes), weights=tuple(self.weights))


@dataclass(kw_only=True, slots=True)
class RolesConfig:
    """Placements of single roles. They hold on top of any option: what is said here wins for its role."""

    master_weights: RoleConfig = field(default_factory=RoleConfig)
    """fp32 weights that the optimizer updates."""
    master_gradients: RoleConfig = field(default_factory=RoleConfig)
    """fp32 gradients."""
    momentum: RoleConfig = field(default_factory=RoleConfig)
    """First moment."""
    variance: RoleConfig = field(default_factory=RoleConfig)
    """Second moment."""
    compute_weights: RoleConfig = field(default_factory=RoleConfig)
    """Weights in compute precision, which the device fetches."""
    compute_gradients: RoleConfig = field(default_factory=RoleConfig)
    """Gradients in compute precision that wait for the update."""
    activations: RoleConfig = field(default_factory=RoleConfig)
    """Inputs of layers that wait for the backward pass."""

    def placements(self) -> dict[str, Placement]:
        """Role -> placement, of those that something was said about."""
        asked = {f.name: getattr(self, f.name).placement for f in fields(self)}
        return {role: placement for role, placement in asked.items() if placement is not None}


@dataclass(kw_only=True, slots=True)
class NumaConfig:
    name: str = "default"
    """Name of the policy; default inherits the caller's, so `numactl ... python -m ldft` works."""
    scope: NumaScope = NumaScope.process
    """What the policy is about. Either way kind, nodes and weights are those of the process, for all that no role has."""
    kind: NumaKind = NumaKind.default
    """How pages are spread over the nodes."""
    nodes: list[int] = field(default_factory=list)
    """Node numbers, e.g. [0,3]; empty for default, and for the interleaves every node that has memory."""
    weights: list[int] = field(default_factory=list)
    """Pages a turn on each of the nodes, in their order, e.g. [1,2]; weighted_interleave only, 1 to 255."""
    roles: RolesConfig = field(default_factory=RolesConfig)
    """Placements of single roles, on top of any option: numa.roles.momentum.nodes=[0,3] numa.roles.momentum.weights=[4,1]."""

    strategy: NumaStrategy = NumaStrategy.none
    """What places the roles that numa.roles says nothing about."""
    local_nodes: list[int] = field(default_factory=list)
    """Nodes of local memory for the strategy; empty: those with CPUs."""
    cxl_nodes: list[int] = field(default_factory=list)
    """Nodes of CXL memory for the strategy; empty: those without CPUs."""
    local_budget_gib: float = 0.0
    """GiB that the roles of all ranks together may take of local memory; 0: what the nodes have, less the processes themselves."""
    cxl_budget_gib: float = 0.0
    """GiB that they may take of CXL memory; 0: what the nodes have."""
    bandwidth: dict[str, Any] = field(default_factory=dict)
    """Bandwidths by node for the strategy optimal, GB/s: {node0:{cpu:278,h2d:55,d2h:55},node3:{cpu:69,h2d:53,d2h:37}};
    empty: the profile that `python -m ldft.bench nodes` saved."""

    @property
    def placement(self) -> Placement:
        """The policy of the process."""
        return Placement(kind=self.kind.name, nodes=tuple(self.nodes), weights=tuple(self.weights))

    @property
    def by_role(self) -> bool:
        """Whether any role has, or gets, a placement of its own."""
        return self.scope is NumaScope.roles or self.strategy is not NumaStrategy.none or bool(self.roles.placements())

    def validate(self) -> None:
        """Raise ConfigError for what is wrong on any machine."""
        self.placement.validate("numa")
        for role, placement in self.roles.placements().items():
            if placement.weights and not placement.nodes:
                raise ConfigError(
                    f"numa.roles.{role}.weights",
                    f"{list(placement.weights)} without nodes; add numa.roles.{role}.nodes, one for each weight",
                )
            placement.validate(f"numa.roles.{role}")
        for key in ("local_budget_gib", "cxl_budget_gib"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"numa.{key}", f"{getattr(self, key):g} is negative; use 0 for all there is, or GiB")
        both = sorted(set(self.local_nodes) & set(self.cxl_nodes))
        if both:
            raise ConfigError("numa.cxl_nodes", f"node {both[0]} is in numa.local_nodes, too; name each node once")
        if self.bandwidth:
            bandwidths.parse(self.bandwidth, bandwidths.KEY)
