"""Builds the DeepSpeed config from ldft's. Every value that changes numerics, memory or overlap is set explicitly: DeepSpeed's
defaults change between releases (0.19.6 and later clip at 1.0 when the key is absent). Imports no torch: the parent prints it in a
dry run."""

from __future__ import annotations

from typing import Any

from ldft import files
from ldft.config import Config, Device, OffloadDevice, Precision
from ldft.config.memory import Pinning
from ldft.errors import CombinationError
from ldft.preflight import deepspeed_file, deepspeed_keys, deepspeed_managed, deepspeed_refused, zero_buckets


def pins(config: Config) -> bool:
    """Whether DeepSpeed pins offloaded tensors. For tensors in ldft's arenas, ldft does or does not pin the arena itself."""
    return config.launch.device is Device.cuda and config.memory.pinning is Pinning.torch


def uses_arenas(config: Config, settings: dict[str, Any]) -> bool:
    """Whether offloaded tensors are in ldft's arenas."""
    return config.memory.pinning is not Pinning.torch and deepspeed_managed.moved_by(settings) is None


def fuses_step(config: Config, settings: dict[str, Any]) -> bool:
    """Whether ldft's own kernel updates the offloaded weights. Raises CombinationError if requested but not possible."""
    asked = config.optimizer.fused_step
    obstacle = None if asked is False else _unfused(config, settings)
    if asked and obstacle:
        raise CombinationError("optimizer.fused_step", f"true: {obstacle}; use false, or leave it at null")
    return asked is not False and obstacle is None


def _unfused(config: Config, settings: dict[str, Any]) -> str | None:
    """Why DeepSpeed's own optimizers must be used; None if ldft's kernel can be."""
    if config.offload.optimizer is not OffloadDevice.cpu:
        return f"works in host memory only, and offload.optimizer is {config.offload.optimizer.name}"
    if kind := deepspeed_managed.moved_by(settings):
        return f"DeepSpeed performs the update itself with {kind}"
    if (ratio := settings["zero_optimization"]["offload_optimizer"].get("ratio", 1.0)) != 1.0:
        return f"with a ratio of {ratio:g}, DeepSpeed updates the rest on the GPU"
    for section in ("bf16", "fp16"):
        for name in ("master_weights_and_grads", "optimizer_states"):
            if settings[section].get(f"{section}_{name}"):
                return f"works in fp32, and offload.deepspeed has {section}.{section}_{name}"
    if settings.get("torch_autocast", {}).get("enabled"):
        return "torch_autocast scales gradients in separate passes"
    if settings.get("zero_force_ds_cpu_optimizer"):
        return "offload.deepspeed has zero_force_ds_cpu_optimizer"
    further = settings["optimizer"]["params"].keys() - {"lr", "weight_decay", "betas", "eps"}
    if further:
        return f"does not support {', '.join(sorted(further))}, which offload.deepspeed sets"
    return None


def build(config: Config) -> dict[str, Any]:
    """The config for `deepspeed.initialize`: ldft's choices, overridden by the user's file, then by the user's keys.

    Raises ConfigError if the user's keys are unknown to DeepSpeed, have the wrong type, or are ldft's own, and if roles have
    placements but DeepSpeed moves them itself.
    """
    settings = _chosen(config)
    owned: dict[str, Any] = {"sequence_parallel_size": 1} | dict(deepspeed_keys.flat(settings))
    for name in ("offload_param", "offload_optimizer"):
        owned[f"zero_optimization.{name}.pin_memory"] = config.memory.pinning is not Pinning.none
    file = config.offload.deepspeed_file
    layers = [(config.offload.deepspeed, "offload.deepspeed")]
    if file:
        path = files.named(file, "offload.deepspeed_file")
        layers.insert(0, (deepspeed_file.read(path), f"offload.deepspeed_file: {path.name}"))
    own = []
    for values, origin in layers:
        values = deepspeed_keys.cleaned(values, origin)
        deepspeed_keys.check_owned(values, owned, origin)
        merge(settings, _without_owned(values))
        own.append((values, origin))
    parameters = settings["optimizer"]["params"]
    if not parameters.get("torch_adam") and not any("fused" in _parameters(values) for values, _ in own):
        parameters.pop("fused", None)  # ldft's choice for torch's AdamW only
    for values, origin in own:
        deepspeed_refused.check(config, values, settings, origin)
    deepspeed_managed.check(config, settings)
    if fuses_step(config, settings):
        settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    kind = deepspeed_managed.moved_by(settings)
    if kind and config.numa.by_role:
        raise CombinationError(
            "numa.scope",
            f"roles cannot be placed with {kind}, because DeepSpeed moves them; use a policy of scope process",
        )
    if kind and config.memory.pinning is Pinning.exact:
        # Tensors that no arena can hold are pinned as in stock DeepSpeed.
        for name in ("offload_param", "offload_optimizer"):
            if "pin_memory" in settings["zero_optimization"][name]:
                settings["zero_optimization"][name]["pin_memory"] = config.launch.device is Device.cuda
    return settings


def _parameters(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = values.get("optimizer", {}).get("params", {})
    return found


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Merge `values` into `into`, section by section."""
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value


def _without_owned(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    return {
        name: _without_owned(value, f"{path}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if f"{path}{name}" not in deepspeed_keys.OWNED
    }


def _chosen(config: Config) -> dict[str, Any]:
    """ldft's choices, without the user's keys and file."""
    train, optimizer, offload = config.train, config.optimizer, config.offload
    zero: dict[str, Any] = {
        "stage": offload.stage,
        "overlap_comm": offload.stage == 3,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500_000_000,
        "allgather_partitions": True,
        "allgather_bucket_size": 500_000_000,
        "round_robin_gradients": False,
        "offload_param": {"device": offload.parameters.name},
        "offload_optimizer": {"device": offload.optimizer.name},
    }
    if offload.stage == 3:
        zero |= zero_buckets.sizes(config)
        zero["memory_efficient_linear"] = zero_buckets.frees_weights_early(config)
        if config.model.num_experts or zero_buckets.whole_layers(config):
            # By default, DeepSpeed would fetch some families' block of experts as a whole and reduce its gradients at its end. That
            # is for experts that are modules, of which each rank runs others; since transformers 5 one module holds all of a layer.
            zero["leaf_module"] = zero_buckets.leaf_modules(config)
    if offload.parameters is not OffloadDevice.none:
        zero["offload_param"] |= {"pin_memory": pins(config)}
    if offload.optimizer is not OffloadDevice.none:
        zero["offload_optimizer"] |= {"pin_memory": pins(config), "ratio": 1.0}
    if offload.parameters is OffloadDevice.nvme:
        zero["offload_param"] |= {"nvme_path": offload.nvme_path, **deepspeed_managed.nvme_sizes(config)}
    if offload.optimizer is OffloadDevice.nvme:
        pipelined = {"pipeline_read": False, "pipeline_write": False, "fast_init": False}
        zero["offload_optimizer"] |= {"nvme_path": offload.nvme_path, "buffer_count": 4, **pipelined}
    lion = optimizer.name == "lion"
    parameters: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "betas": list(optimizer.betas),
    }
    if not lion:
        parameters["eps"] = optimizer.eps
    if offload.optimizer is OffloadDevice.none and not lion:
        # torch's own fused kernel: as fast as DeepSpeed's, without compilation.
        parameters |= {"torch_adam": True, "fused": True}
    fp16: dict[str, Any] = {"enabled": train.precision is Precision.fp16, "loss_scale": train.loss_scale}
    if train.precision is Precision.fp16:
        fp16 |= {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
    shared: dict[str, Any] = {}
    if config.launch.sequence_parallel > 1:
        # By default, DeepSpeed would reduce gradients in fp32, and so keep them twice as large, where ranks share sequences.
        shared = {
            "sequence_parallel_size": config.launch.sequence_parallel,
            "seq_parallel_communication_data_type": train.precision.name,
        }
    return shared | {
        "train_batch_size": config.sequences_per_update,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": optimizer.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": train.precision is Precision.bf16},
        "fp16": fp16,
        "data_types": {"grad_accum_dtype": train.precision.name},
        "optimizer": {"type": "Lion" if lion else "AdamW", "params": parameters},
        # On the device, lion is ldft's own (device_lion.py), which DeepSpeed does not know.
        "zero_allow_untested_optimizer": lion and offload.optimizer is OffloadDevice.none,
        "zero_optimization": zero,
    }
