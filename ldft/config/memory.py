"""How host memory is obtained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Pinning(Enum):
    """torch: pinned by torch's own allocator, as stock DeepSpeed does it; none: pageable."""

    torch = "torch"
    none = "none"


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    pinning: Pinning = Pinning.torch
    """How offloaded tensors that DMA touches are pinned. Without CUDA nothing is pinned."""
