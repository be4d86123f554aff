"""Offload modes in which DeepSpeed moves host tensors itself: their requirements, their costs, and notes for the row.

These are nvme (ZeRO-Infinity), super_offload and zenflow. ldft cannot place their tensors, which are in swap files or in memory
shared by several processes. Source: DeepSpeed 0.19.8, runtime/superoffload, runtime/zenflow, runtime/swap_tensor. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Any

from ldft.config import Config, Device, Precision
from ldft.errors import CombinationError
from ldft.preflight.parameter_counts import frozen_sizes, parameter_sizes, total, trained_sizes, width


def moved_by(settings: dict[str, Any]) -> str | None:
    """nvme, super_offload or zenflow, if the DeepSpeed config enables it."""
    zero = settings["zero_optimization"]
    optimizer, parameters = zero.get("offload_optimizer", {}), zero.get("offload_param", {})
    if "nvme" in (optimizer.get("device"), parameters.get("device")):
        return "nvme"
    if optimizer.get("super_offload"):
        return "super_offload"
    return "zenflow" if zero.get("zenflow") else None


def check(config: Config, settings: dict[str, Any]) -> None:
    """Raise CombinationError where DeepSpeed would fail, or silently train something else."""
    kind = moved_by(settings)
    if kind is None:
        return
    if config.optimizer.name != "adamw":
        raise CombinationError(
            "optimizer", f"{config.optimizer.name}: offload={kind} supports adamw only; use optimizer=adamw"
        )
    if kind == "nvme":
        return
    if config.launch.device is not Device.cuda:
        raise CombinationError("offload", f"{kind} needs launch.device=cuda, not {config.launch.device.name}; use full")
    stage, zero = config.offload.stage, settings["zero_optimization"]
    if zero["offload_optimizer"]["device"] != "cpu":
        raise CombinationError("offload.optimizer", f"{kind} needs cpu, not {zero['offload_optimizer']['device']}")
    if kind == "super_offload" and stage != 3:
        raise CombinationError("offload.stage", f"super_offload needs 3, not {stage}; use 3")
    if kind == "zenflow" and stage not in (1, 2):
        # It transposes every weight first, but takes weights already sharded by zero.Init for vectors and skips them.
        raise CombinationError("offload.stage", f"zenflow needs 1 or 2 here, not {stage}; use 2")
    # Both update during the backward pass, with gradients still multiplied by the loss scale, which may have overflowed.
    scaled = config.train.precision is Precision.fp16
    if kind == "zenflow" and scaled:
        raise CombinationError(
            "train.precision",
            "fp16: zenflow updates with gradients not yet unscaled; use bf16, or offload=optimizer",
        )
    if kind == "super_offload" and scaled and not config.optimizer.gradient_clipping:
        raise CombinationError(
            "optimizer.gradient_clipping",
            "0: super_offload updates with fp16 gradients not yet unscaled; use a norm above 0, or bf16",
        )
    if kind == "zenflow" and config.train.gradient_accumulation_steps > 1:
        raise CombinationError(
            "train.gradient_accumulation_steps",
            f"{config.train.gradient_accumulation_steps}: zenflow accumulates gradients itself "
            "(offload.deepspeed.zero_optimization.zenflow.update_interval); use 1",
        )


def notes(config: Config, settings: dict[str, Any]) -> list[str]:
    """Notes on how such a run's figures differ from those of other runs."""
    kind = moved_by(settings)
    if kind == "super_offload" and config.optimizer.gradient_clipping:
        return [
            f"super_offload: with optimizer.gradient_clipping={config.optimizer.gradient_clipping:g} DeepSpeed updates after the "
            "backward pass; with 0 it updates during that pass"
        ]
    if kind == "zenflow":
        values = settings["zero_optimization"]["zenflow"]
        return [
            f"zenflow is another algorithm: {values.get('topk_ratio', 0.1):.0%} of the columns are updated each iteration, others "
            f"every {values.get('update_interval', 'auto')} iterations; losses and times are not those of AdamW"
        ]
    return []


def shared_memory_bytes(config: Config, settings: dict[str, Any]) -> int:
    """Bytes that all ranks on this host put into /dev/shm for their update processes; 0 if there are none."""
    kind = moved_by(settings)
    # fp32 master weights and gradients; zenflow also keeps a second gradient and an older copy of the weights.
    width = {"super_offload": 8, "zenflow": 16}.get(kind or "", 0)
    overlaps = kind != "zenflow" or settings["zero_optimization"]["zenflow"].get("overlap_step")
    return width * total(trained_sizes(config)) if overlaps else 0


def swap_bytes(config: Config, settings: dict[str, Any]) -> int:
    """Largest total size of all ranks' swap files, bytes: 16 per trained parameter for the optimizer, and every weight in compute
    precision."""
    zero = settings["zero_optimization"]
    trained = total(trained_sizes(config))
    weights = trained + total(frozen_sizes(config))
    optimizer = 16 * trained if zero["offload_optimizer"]["device"] == "nvme" else 0
    return optimizer + (width(config) * weights if zero["offload_param"]["device"] == "nvme" else 0)


def nvme_sizes(config: Config) -> dict[str, Any]:
    """Keys of `zero_optimization.offload_param` in elements: each buffer holds one rank's shard of the largest weight."""
    largest = max(parameter_sizes(config.model))
    return {"buffer_count": 5, "buffer_size": math.ceil(largest / config.launch.num_ranks) + 4096, "max_in_cpu": 0}
