"""The DeepSpeed config, from ours. Every value that changes numerics, memory or overlap is written out: DeepSpeed's own defaults
move between releases (0.19.6 and later clip at 1.0 when the key is absent)."""

from __future__ import annotations

from typing import Any

from ldft.config import Config, Device, OffloadDevice, Precision
from ldft.config.memory import Pinning


def pins(config: Config) -> bool:
    """Whether DeepSpeed is told to pin offloaded tensors."""
    return config.launch.device is Device.cuda and config.memory.pinning is Pinning.torch


def build(config: Config) -> dict[str, Any]:
    """What `deepspeed.initialize` gets."""
    train, optimizer, offload = config.train, config.optimizer, config.offload
    bf16 = train.precision is Precision.bf16
    zero: dict[str, Any] = {
        "stage": offload.stage,
        "overlap_comm": offload.stage == 3,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500_000_000,
        "allgather_partitions": True,
        "allgather_bucket_size": 500_000_000,
        "round_robin_gradients": False,
    }
    if offload.stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        }
    if offload.parameters is OffloadDevice.cpu:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pins(config)}
    if offload.optimizer is OffloadDevice.cpu:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pins(config), "ratio": 1.0}
    parameters: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
    }
    if offload.optimizer is OffloadDevice.none:
        # torch's own fused kernel: as fast as DeepSpeed's, and nothing to compile.
        parameters |= {"torch_adam": True, "fused": True}
    return {
        "train_batch_size": train.micro_batch_size * train.gradient_accumulation_steps * config.launch.num_ranks,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": optimizer.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "bf16" if bf16 else "fp32"},
        "optimizer": {"type": "AdamW", "params": parameters},
        "zero_optimization": zero,
    }
