"""The host-memory policy: on which NUMA nodes the run's bytes are put."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ldft.memory.policy import Placement


class NumaKind(Enum):
    """default: the caller's policy. bind, preferred: these nodes first. interleave: evenly. weighted_interleave: by weight."""

    default = "default"
    bind = "bind"
    preferred = "preferred"
    interleave = "interleave"
    weighted_interleave = "weighted_interleave"


class NumaScope(Enum):
    """process: all memory of the ranks, as numactl would place it."""

    process = "process"


@dataclass(kw_only=True, slots=True)
class NumaConfig:
    name: str = "default"
    """Name of the policy; default inherits the caller's, so `numactl ... python -m ldft` works."""
    scope: NumaScope = NumaScope.process
    """What the policy is about."""
    kind: NumaKind = NumaKind.default
    """How pages are spread over the nodes."""
    nodes: list[int] = field(default_factory=list)
    """Node numbers, e.g. [0,3]; empty for default, and for the interleaves every node that has memory."""
    weights: list[int] = field(default_factory=list)
    """Pages a turn on each of the nodes, in their order, e.g. [1,2]; weighted_interleave only, 1 to 255."""

    @property
    def placement(self) -> Placement:
        return Placement(kind=self.kind.name, nodes=tuple(self.nodes), weights=tuple(self.weights))

    def validate(self) -> None:
        """Raise ConfigError for what is wrong on any machine."""
        self.placement.validate("numa")
