"""A run, fully decided before anything starts: its selection, the placement of each role, and the estimated memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ldft import environment
from ldft.config import Config
from ldft.memory.policy import Placement
from ldft.memory.topology import Topology
from ldft.preflight import device_estimate, device_inputs, gpu_share, host_estimate, role_placement
from ldft.preflight.selection import Selection, select


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Expected bytes of one rank."""

    roles: Mapping[str, int]
    """In host memory, by role."""
    others: Mapping[str, int]
    """In host memory besides the roles, by purpose."""
    moments: Mapping[str, device_estimate.Parts]
    """In device memory, by moment of an iteration, then by purpose."""
    num_ranks: int
    """On each host."""

    @property
    def host_bytes(self) -> int:
        """Peak in the memory of a host, over its ranks."""
        return self.num_ranks * (sum(self.roles.values()) + sum(self.others.values()))

    @property
    def peak(self) -> str:
        """The moment of the peak in device memory."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def device(self) -> device_estimate.Parts:
        """In device memory at the peak, by purpose."""
        return self.moments[self.peak]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(Selection):
    """A Selection with placements and estimate; made once per process and passed on."""

    placements: tuple[Mapping[str, Placement], ...]
    """Role -> placement, for each rank of a host."""
    stripes: Placement | None
    """The process's weighted placement if stripes replace the kernel's weights."""
    estimate: Estimate


def device_gib(config: Config) -> float | None:
    """VRAM of each GPU that the estimate must fit, GiB; None if unknown. A dry run uses memory.vram_gib as given, a run at most the
    memory that the GPU has."""
    said, have = config.memory.vram_gib or None, environment.gpu_memory_gib()
    if said is None or have is None:
        return said or have
    return said if config.dry_run else min(said, have)


def resolve(config: Config, *, topology: Topology | None = None, deepspeed: dict[str, Any] | None = None) -> Resolved:
    """select and complete in one call, with their arguments and errors."""
    return complete(select(config, topology=topology, deepspeed=deepspeed))


def settle(run: Selection) -> Selection:
    """The run with the GPU's share and the inputs on it. Raises CombinationError for a share that is not possible."""
    return gpu_share.relieve(device_inputs.settle(gpu_share.settle(run, device_gib), device_gib), device_gib)


def complete(run: Selection, *, settled: bool = False) -> Resolved:
    """Add the GPU's share and the inputs on it, unless settled says that the run has them, placements and estimate. Raises
    PlacementError if they do not fit the machine or the budgets, and CombinationError for a share that is not possible."""
    if not settled:
        run = settle(run)
    moments = device_estimate.moments(run)
    roles = host_estimate.host_bytes(run)
    others = host_estimate.other_bytes(run, device_estimate.peak_of(moments))
    return Resolved(
        **{field.name: getattr(run, field.name) for field in fields(Selection)},
        placements=tuple(role_placement.assign(run, roles, others)),
        stripes=role_placement.stripes_of_process(run),
        estimate=Estimate(roles=roles, others=others, moments=moments, num_ranks=run.config.launch.ranks_per_host),
    )
