"""How host memory is allocated and pinned."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import ConfigError


class Pinning(Enum):
    """exact: ldft's own arenas, sized exactly, pinned where DMA accesses them; torch: stock DeepSpeed's tensors, pinned by
    torch's allocator; none: ldft's arenas, pageable."""

    exact = "exact"
    torch = "torch"
    none = "none"


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    pinning: Pinning = Pinning.exact
    """Which allocator holds the offloaded tensors, and whether memory that DMA accesses is pinned. Without CUDA, none is."""

    huge_pages: bool = True
    """Ask the kernel for transparent huge pages in ldft's arenas."""

    capacity_gib: float = 0.0
    """Memory of this machine, GiB, for virtual machines that report less and grow as memory is touched; 0: as the kernel reports.
    Set it below the free memory to refuse runs whose estimate exceeds it."""

    vram_gib: float = 0.0
    """Memory of each GPU, GiB, that the estimate must fit; 0: as the driver reports. For dry runs for another machine, or to
    leave part of the GPU to others. Not part of the run's identity."""

    def validate(self) -> None:
        """Raise ConfigError for values that are wrong on any machine."""
        if self.vram_gib < 0:
            raise ConfigError(
                "memory.vram_gib", f"{self.vram_gib:g} is negative; use 0 (as the driver reports) or GiB above 0"
            )
        if self.capacity_gib < 0:
            raise ConfigError(
                "memory.capacity_gib",
                f"{self.capacity_gib:g} is negative; use 0 (as the kernel reports) or GiB above 0",
            )
