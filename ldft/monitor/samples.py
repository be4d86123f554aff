"""What a running machine and its runs look like at one moment: the types that the live monitor shows and the trace keeps.

Sizes are bytes. None stands for what is not known, never for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeUse:
    """One NUMA node, as its meminfo has it."""

    node: int
    total: int
    free: int
    page_cache: int
    """FilePages: files, and shared memory."""
    huge_total: int
    """The pool of hugetlb pages (transparent huge pages are no part of it)."""
    huge_free: int

    @property
    def used(self) -> int:
        """All that is not free, page cache included."""
        return self.total - self.free


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleUse:
    """The tensors of one role in a rank's host memory, on one node."""

    role: str
    node: int | None
    """None: not verified, so all of the role is here."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """A rank's GPU, as NVML sees it: all processes on it."""

    vram_used: int | None
    vram_total: int | None
    utilisation_percent: int | None
    """Of the last period in which some kernel ran, as nvidia-smi shows it."""
    pcie_rx_kb_per_s: int | None
    """To the GPU, over the 20 ms of NVML's reading; None for a slice of a GPU (MIG), which has no counter."""
    pcie_tx_kb_per_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUse:
    rank: int | None
    """None for a process of another user whose reports may not be read."""
    pid: int
    phase: str
    """As in its report: start, imports, operators, rendezvous, model, checkpoint_buffers, engine, train, teardown."""
    cores_busy: float | None
    """CPU seconds a second since the sample before, of the rank and what it started; None in the first sample."""
    memory: tuple[tuple[int, int], ...] | None
    """(node, bytes) of the process, as numastat -p counts them; None: not read yet, or another user's."""
    memory_age_s: float
    """How long ago `memory` was read: reading it costs the more, the more there is."""
    roles: tuple[RoleUse, ...]
    pinned: int | None
    """Bytes of tensors with a role that are registered with CUDA."""
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
    """Model, length and policy; empty where the config may not be read."""
    phase: str
    phase_text: str
    iteration: int
    """Iterations that have ended, warm-up included."""
    iterations: int | None
    tokens_per_s: float | None
    """Of the last iteration, all ranks together."""
    ranks: tuple[RankUse, ...]
    forbidden: bool
    """Memory or reports of the run may not be read: it is another user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    time: float
    """Seconds since 1970."""
    nodes: tuple[NodeUse, ...]
    runs: tuple[RunUse, ...]
