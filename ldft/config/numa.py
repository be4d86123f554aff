"""The host-memory policy: which NUMA nodes hold the run's memory."""

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
    """process: all memory of the ranks, as numactl would place it. roles: each group of offloaded tensors separately."""

    process = "process"
    roles = "roles"


class NumaStrategy(Enum):
    """none: place roles by numa.roles. local_only: all roles in local memory. naive_interleaving: all roles evenly over local
    memory and CXL. cxl_aware: fill local memory by priority up to its budget, put the rest in CXL. striped: as cxl_aware, but
    assign the ranks' layer inputs and 16-bit gradients to the CXL nodes in turn. optimal: the fastest by the cost model."""

    none = "none"
    local_only = "local_only"
    naive_interleaving = "naive_interleaving"
    cxl_aware = "cxl_aware"
    striped = "striped"
    optimal = "optimal"


@dataclass(kw_only=True, slots=True)
class RoleConfig:
    """Placement of one role's tensors; if nothing is set, they follow the rest of the policy."""

    kind: NumaKind = NumaKind.default
    """How pages are spread. default: weighted_interleave if weights are given, bind for one node, interleave for several."""
    nodes: list[int] = field(default_factory=list)
    """Node numbers, e.g. [0,3]."""
    weights: list[int] = field(default_factory=list)
    """Pages per turn on each node, in the order of `nodes`, e.g. [4,1]; weights may differ between roles."""

    @property
    def placement(self) -> Placement | None:
        """None if nothing is set for this role."""
        kind = self.kind.name
        if self.kind is NumaKind.default:
            if not self.nodes and not self.weights:
                return None
            kind = "weighted_interleave" if self.weights else "bind" if len(self.nodes) == 1 else "interleave"
        return Placement(kind=kind, nodes=tuple(self.nodes), weights=tuple(self.weights))


@dataclass(kw_only=True, slots=True)
class RolesConfig:
    """Placements of single roles; they override the chosen numa option."""

    master_weights: RoleConfig = field(default_factory=RoleConfig)
    """fp32 weights that the optimizer updates."""
    master_gradients: RoleConfig = field(default_factory=RoleConfig)
    """fp32 gradients."""
    momentum: RoleConfig = field(default_factory=RoleConfig)
    """First moment."""
    variance: RoleConfig = field(default_factory=RoleConfig)
    """Second moment."""
    compute_weights: RoleConfig = field(default_factory=RoleConfig)
    """Weights in compute precision, fetched by the device."""
    compute_gradients: RoleConfig = field(default_factory=RoleConfig)
    """Gradients in compute precision, kept for the update."""
    activations: RoleConfig = field(default_factory=RoleConfig)
    """Layer inputs kept for the backward pass."""

    def placements(self) -> dict[str, Placement]:
        """Role -> placement, for the roles that have one."""
        asked = {f.name: getattr(self, f.name).placement for f in fields(self)}
        return {role: placement for role, placement in asked.items() if placement is not None}


@dataclass(kw_only=True, slots=True)
class NumaConfig:
    name: str = "default"
    """Name of the policy; default inherits the caller's, so `numactl ... python -m ldft` works."""
    scope: NumaScope = NumaScope.process
    """What the policy applies to. In both scopes, kind, nodes and weights set the process policy, which covers memory without a
    role-specific placement."""
    kind: NumaKind = NumaKind.default
    """How pages are spread over the nodes."""
    nodes: list[int] = field(default_factory=list)
    """Node numbers, e.g. [0,3]; empty for kind default; for the interleaves, empty means every node with memory."""
    weights: list[int] = field(default_factory=list)
    """Pages per turn on each node, in the order of `nodes`, e.g. [1,2]; weighted_interleave only, 1 to 255."""
    roles: RolesConfig = field(default_factory=RolesConfig)
    """Placements of single roles, with any option: numa.roles.momentum.nodes=[0,3] numa.roles.momentum.weights=[4,1]."""

    strategy: NumaStrategy = NumaStrategy.none
    """Places the roles that numa.roles does not set."""
    local_nodes: list[int] = field(default_factory=list)
    """Local-memory nodes for the strategy; empty: nodes with CPUs."""
    cxl_nodes: list[int] = field(default_factory=list)
    """CXL nodes for the strategy; empty: nodes without CPUs."""
    local_budget_gib: float = 0.0
    """Local memory that the roles may use, GiB, over all ranks; 0: what the nodes have, less the processes' own memory."""
    cxl_budget_gib: float = 0.0
    """CXL memory that the roles may use, GiB, over all ranks; 0: what the nodes have."""
    bandwidth: dict[str, Any] = field(default_factory=dict)
    """Bandwidths by node for strategy optimal, GB/s: {node0:{cpu:278,h2d:55,d2h:55},node3:{cpu:69,h2d:53,d2h:37}};
    empty: the profile that `python -m ldft.bench nodes` saved."""

    @property
    def placement(self) -> Placement:
        """The process policy."""
        return Placement(kind=self.kind.name, nodes=tuple(self.nodes), weights=tuple(self.weights))

    @property
    def by_role(self) -> bool:
        """Whether any role has its own placement, from numa.roles or a strategy."""
        return self.scope is NumaScope.roles or self.strategy is not NumaStrategy.none or bool(self.roles.placements())

    def validate(self) -> None:
        """Raise ConfigError for values that are wrong on any machine."""
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
                raise ConfigError(
                    f"numa.{key}", f"{getattr(self, key):g} is negative; use 0 for all available memory, or GiB above 0"
                )
        both = sorted(set(self.local_nodes) & set(self.cxl_nodes))
        if both:
            raise ConfigError("numa.cxl_nodes", f"node {both[0]} is also in numa.local_nodes; list each node once")
        if self.bandwidth:
            bandwidths.parse(self.bandwidth, bandwidths.KEY)
