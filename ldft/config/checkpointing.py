"""Where the input of each decoder layer waits for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class CheckpointingMode(Enum):
    """gpu: recompute each layer, its input stays on the device; none: keep every activation."""

    gpu = "gpu"
    none = "none"


@dataclass(kw_only=True, slots=True)
class CheckpointingConfig:
    mode: CheckpointingMode = CheckpointingMode.gpu
    """Gradient checkpointing of the decoder layers."""
