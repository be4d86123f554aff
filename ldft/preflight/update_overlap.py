"""Decides whether the update of offloaded weights runs beside the next forward pass. Imports no torch."""

from __future__ import annotations

from typing import Any

from ldft.config import Config, Device, OffloadDevice
from ldft.errors import CombinationError

KEY = "optimizer.overlap_step"


def choose(config: Config, settings: dict[str, Any], *, fused: bool) -> tuple[bool, str]:
    """Whether it does, and why not: empty if it does, or if nothing is updated in host memory.

    settings: the effective DeepSpeed config. fused: whether ldft's kernel updates. Raises CombinationError if the overlap is
    requested but not possible.
    """
    asked = config.optimizer.overlap_step
    obstacle = _obstacle(config, settings, fused)
    if asked and obstacle:
        raise CombinationError(KEY, f"true: {obstacle}; use false, or leave it at null")
    if asked is not None:
        return asked, "" if asked else "switched off"
    if config.offload.optimizer is OffloadDevice.none:
        return False, ""
    reason = obstacle or _no_gain(config)
    return not reason, reason


def _obstacle(config: Config, settings: dict[str, Any], fused: bool) -> str:
    """Why the update cannot overlap without changing results."""
    if config.offload.optimizer is OffloadDevice.none:
        return "the device updates the weights (offload.optimizer=none)"
    if not fused:
        return "needs the fused step (optimizer.fused_step), which does not run here"
    if config.offload.stage != 3:
        return f"ZeRO-{config.offload.stage} gathers all weights at once after the update; use offload.stage=3"
    if config.offload.parameters is OffloadDevice.none:
        return "the weights are in device memory (offload.parameters=none), where they are copied after the update"
    if settings["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
        return "zero_hpz_partition_size keeps a second copy of the weights"
    if settings["zero_optimization"].get("mics_shard_size", -1) > 0:
        return "mics_shard_size shards weights in another way"
    return ""


def _no_gain(config: Config) -> str:
    """Why an overlap would not save time."""
    if config.lora.rank:
        return "adapters stay on the device, so there is no forward pass to overlap with"
    if config.launch.device is Device.cpu:
        return "the forward pass needs the same cores (launch.device=cpu)"
    return ""
