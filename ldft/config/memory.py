"""How host memory is obtained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import ConfigError


class Pinning(Enum):
    """exact: in ldft's own arenas, exact bytes, pinned where DMA touches them; torch: stock DeepSpeed's tensors, pinned by
    torch's allocator; none: ldft's arenas, pageable."""

    exact = "exact"
    torch = "torch"
    none = "none"


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    pinning: Pinning = Pinning.exact
    """Whose host memory offloaded tensors lie in, and whether what DMA touches is pinned. Without CUDA nothing is pinned."""

    huge_pages: bool = True
    """Ask the kernel for transparent huge pages in ldft's arenas."""

    capacity_gib: float = 0.0
    """This machine's memory, GiB, for virtual machines that show less and grow as it is touched; 0: what the kernel says. Less than
    what is free: runs that are expected to take more are refused."""

    vram_gib: float = 0.0
    """Memory of each GPU, GiB, against which the estimate is held; 0: what the driver says. For dry runs of a machine that is not
    here, or to leave part of the GPU to others. Not part of the run's identity."""

    def validate(self) -> None:
        """Raise ConfigError for what is wrong on any machine."""
        if self.vram_gib < 0:
            raise ConfigError(
                "memory.vram_gib", f"{self.vram_gib:g} is no size; use 0 (what the driver says) or GiB above 0"
            )
        if self.capacity_gib < 0:
            raise ConfigError(
                "memory.capacity_gib", f"{self.capacity_gib:g} is no size; use 0 (what the kernel says) or GiB above 0"
            )
