"""The ZeRO stage and what lives in host memory between its uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ldft.errors import ConfigError


class OffloadDevice(Enum):
    """Where a group of tensors waits between its uses."""

    none = "none"
    cpu = "cpu"


@dataclass(kw_only=True, slots=True)
class OffloadConfig:
    stage: int = 3
    """ZeRO stage: 0 none, 1 optimizer, 2 and gradients, 3 and parameters are sharded over the ranks."""

    parameters: OffloadDevice = OffloadDevice.cpu
    """Where 16-bit parameters wait (cpu needs stage 3)."""

    optimizer: OffloadDevice = OffloadDevice.cpu
    """Where master weights, gradients and moments live (cpu needs stage 1, 2 or 3)."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's own config, by its names and nesting. They replace what ldft chooses and what the file says."""

    deepspeed_file: str = ""
    """A DeepSpeed JSON file as base: its values replace what ldft chooses, other than by a key of its own."""

    def validate(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError("offload.stage", f"{self.stage} does not exist; use 0, 1, 2 or 3")
        if self.parameters is OffloadDevice.cpu and self.stage != 3:
            raise ConfigError("offload.parameters", f"cpu needs offload.stage=3, not {self.stage}; use none or stage 3")
        if self.optimizer is OffloadDevice.cpu and self.stage == 0:
            raise ConfigError(
                "offload.optimizer", "cpu needs offload.stage=1, 2 or 3, not 0; use none or a higher stage"
            )
