"""The state of a machine and its runs at one moment: the types that the live monitor shows and the trace stores.

Sizes are bytes. None means unknown, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeUse:
    """One NUMA node, from its meminfo."""

    node: int
    total: int
    free: int
    page_cache: int
    """FilePages: files, and shared memory."""
    huge_total: int
    """The pool of hugetlb pages, without transparent huge pages."""
    huge_free: int

    @property
    def used(self) -> int:
        """All memory that is not free, including page cache."""
        return self.total - self.free


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleUse:
    """The tensors of one role in a rank's host memory, on one node."""

    role: str
    node: int | None
    """None: not verified; the entry covers the whole role."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """A rank's GPU as NVML reports it, over all its processes."""

    vram_used: int | None
    vram_total: int | None
    utilisation_percent: int | None
    """Percentage of the last sample period during which a kernel ran, as in nvidia-smi."""
    pcie_rx_kb_per_s: int | None
    """To the GPU, over the 20 ms of NVML's reading; None for a MIG slice, which has no counter."""
    pcie_tx_kb_per_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUse:
    rank: int | None
    """None for another user's process whose reports may not be read."""
    pid: int
    phase: str
    """As in its report: start, imports, operators, rendezvous, model, checkpoint_buffers, engine, train, teardown."""
    cores_busy: float | None
    """CPU seconds per second since the previous sample, of the rank and its child processes; None in the first sample."""
    memory: tuple[tuple[int, int], ...] | None
    """(node, bytes) of the process, as numastat -p counts them; None: not read yet, or another user's process."""
    memory_age_s: float
    """Age of `memory`: the more memory, the more expensive and rarer its reading."""
    roles: tuple[RoleUse, ...]
    pinned: int | None
    """Bytes of role tensors that are registered with CUDA."""
    device: DeviceUse | None

    @property
    def resident(self) -> int | None:
        return None if self.memory is None else sum(size for _, size in self.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUse:
    folder: str
    """The attempt: results/<run_id>/attempt-<n>."""
    user: str
    title: str
    """Model, length and policy; empty if the config may not be read."""
    phase: str
    phase_text: str
    iteration: int
    """Completed iterations, including warm-up."""
    iterations: int | None
    update_s: float | None
    """Seconds of the completed iterations in which the fused step's update was in progress; None: another kernel updates."""
    tokens_per_s: float | None
    """Rate of the last iteration, over all ranks."""
    ranks: tuple[RankUse, ...]
    forbidden: bool
    """Whether the run's memory or reports may not be read because it belongs to another user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    time: float
    """Seconds since 1970."""
    nodes: tuple[NodeUse, ...]
    runs: tuple[RunUse, ...]
