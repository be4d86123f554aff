"""Where the inputs of the decoder layers are kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import CombinationError, ConfigError
from ldft.terminal import plural


class CheckpointingMode(Enum):
    """cpu: recompute each layer from its input, kept in host memory; gpu: the same, kept on the device; none: keep every
    activation."""

    cpu = "cpu"
    gpu = "gpu"
    none = "none"


class KeepAttention(Enum):
    """none: recompute attention with its layer; device, host: keep its output there instead."""

    none = "none"
    device = "device"
    host = "host"


@dataclass(kw_only=True, slots=True)
class CheckpointingConfig:
    mode: CheckpointingMode = CheckpointingMode.cpu
    """Gradient checkpointing of the decoder layers."""

    layers: int = -1
    """Number of layers to checkpoint, counted from the first; the others keep their activations on the device. -1: all."""

    every: int = 1
    """k: keep the input of every k-th layer only; the backward pass recomputes k layers at once. A larger k stores fewer inputs
    but holds more activations at a time."""

    keep_attention: KeepAttention = KeepAttention.none
    """Where to keep attention outputs so that the backward pass need not recompute them. Takes as much memory as the layer
    inputs."""

    device_inputs: int | None = None
    """With mode cpu: how many of the kept inputs stay on the device, counted from the last, whose backward pass comes first. null:
    one, and more where host memory would not hold the others."""

    def validate(self, num_layers: int) -> None:
        """Raise ConfigError if a value is wrong for a model of `num_layers` layers."""
        if not -1 <= self.layers <= num_layers:
            raise ConfigError(
                "checkpointing.layers",
                f"{self.layers}: the model has {plural(num_layers, 'layer')}; use 0 to {num_layers}, or -1 for all",
            )
        if self.mode is CheckpointingMode.none and self.layers > 0:
            raise CombinationError(
                "checkpointing.layers", f"{self.layers} needs checkpointing=cpu or gpu, not none; leave it at -1"
            )
        if self.every < 1 or self.every > num_layers:
            raise ConfigError(
                "checkpointing.every",
                f"{self.every}: the model has {plural(num_layers, 'layer')}; use 1 to {num_layers}",
            )
        if self.mode is CheckpointingMode.none and self.every > 1:
            raise CombinationError(
                "checkpointing.every", f"{self.every} needs checkpointing=cpu or gpu, not none; leave it at 1"
            )
        if self.device_inputs is not None and self.mode is not CheckpointingMode.cpu:
            raise CombinationError(
                "checkpointing.device_inputs",
                f"{self.device_inputs}: without checkpointing=cpu no input is in host memory; leave it at null",
            )
        kept = self.groups(num_layers)
        if self.device_inputs is not None and not 1 <= self.device_inputs <= max(1, kept):
            raise ConfigError(
                "checkpointing.device_inputs",
                f"{self.device_inputs}: the run keeps {plural(kept, 'input')}; use 1 to {max(1, kept)}, or null",
            )
        if self.keep_attention is not KeepAttention.none and self.recomputed(num_layers) == 0:
            raise CombinationError(
                "checkpointing.keep_attention",
                f"{self.keep_attention.name} needs checkpointed layers: checkpointing=cpu or gpu, and "
                "checkpointing.layers other than 0; use none",
            )

    def recomputed(self, num_layers: int) -> int:
        """Number of checkpointed layers."""
        if self.mode is CheckpointingMode.none:
            return 0
        return num_layers if self.layers == -1 else self.layers

    def groups(self, num_layers: int) -> int:
        """Number of layer groups, each recomputed at once; the last group may be smaller."""
        return -(-self.recomputed(num_layers) // self.every)
