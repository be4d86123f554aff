"""Where the inputs of the decoder layers wait for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import CombinationError, ConfigError


class CheckpointingMode(Enum):
    """cpu: recompute each layer, its input waits in host memory; gpu: it stays on the device; none: keep every activation."""

    cpu = "cpu"
    gpu = "gpu"
    none = "none"


@dataclass(kw_only=True, slots=True)
class CheckpointingConfig:
    mode: CheckpointingMode = CheckpointingMode.cpu
    """Gradient checkpointing of the decoder layers."""

    every: int = 1
    """Keep the input of every k-th layer only; the backward pass recomputes so many layers at once. Fewer inputs, more
    activations at a time."""

    def validate(self, num_layers: int) -> None:
        """Raise ConfigError where a value is wrong for a model of so many layers."""
        if not 1 <= self.every <= num_layers:
            raise ConfigError(
                "checkpointing.every", f"{self.every}: the model has {num_layers} layers; use 1 to {num_layers}"
            )
        if self.mode is CheckpointingMode.none and self.every > 1:
            raise CombinationError(
                "checkpointing.every", f"{self.every} needs checkpointing=cpu or gpu, not none; leave it at 1"
            )

    def groups(self, num_layers: int) -> int:
        """Groups of layers that are recomputed at once; the last one may be smaller."""
        return -(-num_layers // self.every)
