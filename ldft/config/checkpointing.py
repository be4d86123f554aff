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


class KeepAttention(Enum):
    """none: attention is computed again with its layer; device, host: its output waits there instead."""

    none = "none"
    device = "device"
    host = "host"


@dataclass(kw_only=True, slots=True)
class CheckpointingConfig:
    mode: CheckpointingMode = CheckpointingMode.cpu
    """Gradient checkpointing of the decoder layers."""

    layers: int = -1
    """How many layers, from the first on, are checkpointed; the others keep their activations on the device. -1: all."""

    every: int = 1
    """Keep the input of every k-th layer only; the backward pass recomputes so many layers at once. Fewer inputs, more
    activations at a time."""

    keep_attention: KeepAttention = KeepAttention.none
    """Where the output of attention waits for the backward pass, which then need not compute it again: as much memory as
    layer inputs take."""

    def validate(self, num_layers: int) -> None:
        """Raise ConfigError where a value is wrong for a model of so many layers."""
        if not -1 <= self.layers <= num_layers:
            raise ConfigError(
                "checkpointing.layers",
                f"{self.layers}: the model has {num_layers} layers; use 0 to {num_layers}, or -1 for all",
            )
        if self.mode is CheckpointingMode.none and self.layers > 0:
            raise CombinationError(
                "checkpointing.layers", f"{self.layers} needs checkpointing=cpu or gpu, not none; leave it at -1"
            )
        if self.every < 1 or self.every > num_layers:
            raise ConfigError(
                "checkpointing.every", f"{self.every}: the model has {num_layers} layers; use 1 to {num_layers}"
            )
        if self.mode is CheckpointingMode.none and self.every > 1:
            raise CombinationError(
                "checkpointing.every", f"{self.every} needs checkpointing=cpu or gpu, not none; leave it at 1"
            )
        if self.keep_attention is not KeepAttention.none and self.recomputed(num_layers) == 0:
            raise CombinationError(
                "checkpointing.keep_attention",
                f"{self.keep_attention.name} needs layers that are checkpointed: checkpointing=cpu or gpu, and "
                "checkpointing.layers other than 0; use none",
            )

    def recomputed(self, num_layers: int) -> int:
        """How many of the layers are checkpointed."""
        if self.mode is CheckpointingMode.none:
            return 0
        return num_layers if self.layers == -1 else self.layers

    def groups(self, num_layers: int) -> int:
        """Groups of layers that are recomputed at once; the last one may be smaller."""
        return -(-self.recomputed(num_layers) // self.every)
