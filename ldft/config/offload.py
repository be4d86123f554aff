"""The ZeRO stage, and which tensors are offloaded between uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ldft.errors import CombinationError, ConfigError


class OffloadDevice(Enum):
    """Where a group of tensors is kept between uses. none: on the device; cpu: in host memory; nvme: in swap files on a disk."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(kw_only=True, slots=True)
class OffloadConfig:
    stage: int = 3
    """ZeRO stage, i.e. what is sharded over the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""

    parameters: OffloadDevice = OffloadDevice.cpu
    """Where 16-bit parameters are kept between uses (cpu and nvme need stage 3)."""

    optimizer: OffloadDevice = OffloadDevice.cpu
    """Where master weights, gradients and moments are kept (cpu needs stage 1, 2 or 3; nvme needs 3)."""

    gpu_share: float | None = None
    """0 to 1: with both in host memory, the part of the parameters that the GPU updates, from the embedding on, in whole layers;
    their optimizer state is then in device memory. null: what hides the rest of the update beside the forward pass, as far as
    device memory allows (needs the host's bandwidth: numa.bandwidth, or python -m ldft.bench nodes). It changes no result."""

    nvme_path: str = ""
    """Folder on a fast local disk for nvme swap files; a run removes its own files when it ends."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's own config, with its names and nesting. They override ldft's choices and
    offload.deepspeed_file."""

    deepspeed_file: str = ""
    """A DeepSpeed JSON file as base: its values override ldft's choices, except those that have an ldft key."""

    def validate(self) -> None:
        if self.gpu_share is not None and not 0 <= self.gpu_share <= 1:
            raise ConfigError("offload.gpu_share", f"{self.gpu_share:g} is not a share; use 0 to 1, or null")
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError("offload.stage", f"{self.stage} does not exist; use 0, 1, 2 or 3")
        if self.parameters is not OffloadDevice.none and self.stage != 3:
            raise CombinationError(
                "offload.parameters",
                f"{self.parameters.name} needs offload.stage=3, not {self.stage}; use none or stage 3",
            )
        if self.optimizer is OffloadDevice.nvme and self.stage != 3:
            raise CombinationError(
                "offload.optimizer", f"nvme needs offload.stage=3, not {self.stage}; use cpu or stage 3"
            )
        if self.optimizer is OffloadDevice.cpu and self.stage == 0:
            raise CombinationError(
                "offload.optimizer", "cpu needs offload.stage=1, 2 or 3, not 0; use none or a higher stage"
            )
        on_disk = OffloadDevice.nvme in (self.parameters, self.optimizer)
        if on_disk and not self.nvme_path:
            raise ConfigError("offload.nvme_path", "empty; name a folder on a fast local disk for the swap files")
        if self.nvme_path and not on_disk:
            raise CombinationError(
                "offload.nvme_path",
                f"'{self.nvme_path}' is not used: nothing is offloaded to nvme; use offload=nvme or leave it out",
            )
