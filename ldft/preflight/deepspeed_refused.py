"""DeepSpeed keys that exist but cannot be used here: DeepSpeed fails on them after the ranks have started, or ignores them, or
trains something other than the row says.

Found by running DeepSpeed 0.19.8 with each key of its config switched on. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldft.config import Config, Device, OffloadDevice
from ldft.config.memory import Pinning
from ldft.errors import ConfigError, shown
from ldft.preflight import deepspeed_keys
from ldft.preflight.parameter_counts import frozen_sizes, total, trained_sizes

# Section -> the package that DeepSpeed imports when the section is enabled.
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}

_NO_CHECKPOINTS = "ldft saves no checkpoints; leave it out"
_OWN_BATCHES = "ldft makes its own batches of whole sequences, and its tokens/s counts every token; leave it out"
_NOT_COMPILED = "takes effect in engine.compile(), which ldft does not call; leave it out"
_WHOLE_LAYERS = "each rank of ldft computes whole layers of its own sequences; leave it out, or use 1"
_INFERENCE = "quantises weights for inference; leave it out"
# Key, or section that covers all keys below it -> values without effect, and why others are refused.
_ALWAYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel.autotp_size": ((0, 1), _WHOLE_LAYERS),
    "tensor_parallel.tp.tp_size": ((1,), _WHOLE_LAYERS),
    "pipeline": ((), "takes effect for a PipelineModule, and ldft trains transformers' models; leave it out"),
    "expert_parallel.enabled": ((False,), "each rank of ldft computes all experts; leave it out"),
    "hybrid_engine.enabled": ((False,), "alternates training with generation; leave it out"),
    "compile.deepcompile": ((False,), _NOT_COMPILED),
    "compile.autoep_non_moe": ((False,), _NOT_COMPILED),
    "data_efficiency.enabled": ((False,), _OWN_BATCHES),
    "data_efficiency.data_sampling.enabled": ((False,), _OWN_BATCHES),
    "data_efficiency.data_sampling.curriculum_learning.enabled": ((False,), _OWN_BATCHES),
    "data_efficiency.data_routing.enabled": ((False,), _OWN_BATCHES),
    "data_efficiency.data_routing.random_ltd.enabled": ((False,), _OWN_BATCHES),
    "autotuning.enabled": ((False,), "runs in DeepSpeed's launcher, which ldft does not use; sweep with -m instead"),
    "weight_quantization.enabled": ((False,), _INFERENCE),
    "weight_quantization.quantized_initialization": ((), _INFERENCE),
    "weight_quantization.post_init_quant": ((), _INFERENCE),
    "checkpoint.writer": ((), _NO_CHECKPOINTS),
    "datastates_ckpt": ((), _NO_CHECKPOINTS),
    "zero_optimization.legacy_stage1": ((False,), "is not supported in deepspeed >= 0.5.9; leave it out"),
    "optimizer.params.maximize": ((False,), "maximises the loss; leave it out"),
    "optimizer.params.differentiable": ((False,), "keeps a graph of each update; leave it out"),
}
# ZeRO++ -> its values without effect.
_ZERO_PLUS_PLUS = {
    "zero_hpz_partition_size": (0, 1),
    "zero_quantized_weights": (False,),
    "zero_quantized_nontrainable_weights": (False,),
    "zero_quantized_gradients": (False,),
}
# Keys of optimizer.params that each of the optimizers takes, besides lr, betas, eps and weight_decay.
_OF_OPTIMIZER = "optimizer.params."
_COMMON = {"lr", "betas", "eps", "weight_decay", "max_grad_norm", "torch_adam", "adam_w_mode"}
_PARAMETERS = {
    "torch's AdamW": {"amsgrad", "foreach", "fused", "capturable", "maximize", "differentiable"},
    "DeepSpeedCPUAdam": {"bias_correction", "fp32_optimizer_states"},
    "FusedAdam": {"bias_correction", "set_grad_none"},
    "DeepSpeedCPULion": {"fp32_optimizer_states"},
    "ldft's Lion": set[str](),
}
# Keys that add work or waits to every iteration.
_MEASURING = (
    *(f"{name}.enabled" for name in (*MONITORS, "csv_monitor", "flops_profiler", "comms_logger")),
    "wall_clock_breakdown",
    "memory_breakdown",
    "zero_optimization.enable_sanity_checks",
)


def check(config: Config, values: dict[str, Any], settings: dict[str, Any], origin: str) -> None:
    """Raise ConfigError for a key of a user's DeepSpeed config that cannot be used.

    values: the user's own keys, checked by deepspeed_keys. settings: the complete DeepSpeed config with them merged in.
    origin: the name that errors show, as in deepspeed_keys.
    """
    # A key of the file that the command line overrides does not count.
    effective = dict(deepspeed_keys.flat(settings))
    own = {key: value for key, value in deepspeed_keys.flat(values) if effective.get(key) == value}
    for key, problem in (*_unconditional(own), *_depending(config, own, settings), *_optimizer(config, own, settings)):
        raise ConfigError(deepspeed_keys.where(origin, key), problem)


def notes(settings: dict[str, Any]) -> list[str]:
    """Notes for the row on keys that change its times or the update."""
    flat = dict(deepspeed_keys.flat(settings))
    found = []
    if keys := [key for key in _MEASURING if flat.get(key)]:
        found.append(
            f"offload.deepspeed: {', '.join(keys)}: DeepSpeed's own measurements are part of the times of the iterations"
        )
    names = ("adam_w_mode", "bias_correction")
    if keys := [f"optimizer.params.{name}" for name in names if flat.get(f"optimizer.params.{name}") is False]:
        found.append(f"offload.deepspeed: {', '.join(keys)}=false: not the update of AdamW")
    return found


def _unconditional(own: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, (harmless, problem) in _ALWAYS.items():
        for key, value in own.items():
            if (key == name or key.startswith(f"{name}.")) and not _is_one_of(value, harmless) and value != {}:
                yield key, f"{shown(value)}: {problem}"
    for name, package in MONITORS.items():
        if own.get(f"{name}.enabled") and importlib.util.find_spec(package) is None:
            yield (
                f"{name}.enabled",
                f"true needs the package {package}, which is not installed (No module named '{package}'); "
                f"pip install {package}, or use false",
            )
        elif name == "wandb" and own.get("wandb.enabled") and not _logged_in():
            yield (
                "wandb.enabled",
                "true needs a login to W&B (No API key); run wandb login, set WANDB_API_KEY or WANDB_MODE=offline, or use false",
            )


def _logged_in() -> bool:
    """Whether the package wandb would find a key, or needs none. It keeps keys in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") not in ("online", "run"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for file in (Path(os.environ.get("NETRC") or "~/.netrc").expanduser(), Path("~/_netrc").expanduser()):
        try:
            if netrc(file).authenticators(host):
                return True
        except (OSError, NetrcParseError):
            continue
    return False


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in harmless)


def _depending(config: Config, own: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that only some runs can use."""
    stage, zero, ranks = config.offload.stage, settings["zero_optimization"], config.launch.num_ranks
    for name, harmless in _ZERO_PLUS_PLUS.items():
        key = f"zero_optimization.{name}"
        if key not in own or _is_one_of(own[key], harmless):
            continue
        value = shown(own[key])
        if config.launch.device is not Device.cuda:
            yield key, f"{value}: ZeRO++ needs launch.device=cuda, not {config.launch.device.name}; leave it out"
        if stage != 3:
            yield key, f"{value}: ZeRO++ needs offload.stage=3, not {stage}; leave it out"
        if name == "zero_hpz_partition_size" and ranks % own[key]:
            yield key, f"{value} does not divide launch.num_ranks={ranks}; use a divisor, or leave it out"
    if stage in (2, 3) and zero.get("reduce_scatter", True):
        for key, one in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if own.get(key, one) != one:
                yield (
                    key,
                    f"{shown(own[key])} is not supported with ZeRO-{stage} with reduce scatter enabled; add "
                    "zero_optimization.reduce_scatter=false, or leave it out",
                )
    shared, by_all = config.launch.sequence_parallel > 1, "communication_data_type"
    ignored, read = (by_all, f"seq_parallel_{by_all}") if shared else (f"seq_parallel_{by_all}", by_all)
    if own.get(ignored, settings.get(read)) != settings.get(read):
        yield (
            ignored,
            f"{own[ignored]} has no effect with launch.sequence_parallel={config.launch.sequence_parallel}; set {read}",
        )
    if own.get("gradient_allreduce_op") == "sum" and stage == 3:
        yield "gradient_allreduce_op", "sum is not supported with ZeRO stage 3; use mean"
    if own.get("managed_gradient_accumulation") is False and config.train.gradient_accumulation_steps > 1:
        yield (
            "managed_gradient_accumulation",
            "false updates the weights after each of the "
            f"train.gradient_accumulation_steps={config.train.gradient_accumulation_steps} micro-batches; use true",
        )
    if own.get("aio.use_gds") and config.launch.device is not Device.cuda:
        yield "aio.use_gds", f"true needs launch.device=cuda, not {config.launch.device.name}; use false"
    threshold = "zero_optimization.stage3_module_granularity_threshold"
    whole = total(trained_sizes(config)) + total(frozen_sizes(config))
    # DeepSpeed compares it with parameters / (1 + modules below), and a model has more modules than layers.
    if stage == 3 and own.get(threshold, 0) > (most := whole // (1 + config.model.num_layers)):
        yield (
            threshold,
            f"{own[threshold]} takes the whole model for one module (unknown parameter type); use less than {most}",
        )
    precision = config.train.precision.name
    for name in ("param_dtype", "grad_accum_dtype"):
        asked = own.get(f"data_types.{name}")
        if asked is None or _same_dtype(asked, precision):
            continue
        if name == "param_dtype":
            yield f"data_types.{name}", f"{asked} contradicts train.precision={precision}; leave it out"
        elif stage == 0 and precision != "fp32":
            yield (
                f"data_types.{name}",
                f"{asked}: unsupported mix with train.precision={precision} and offload.stage=0; leave it out",
            )
    if own.get("zero_optimization.compute_grad_norm") is False:
        if stage not in (1, 2):
            yield "zero_optimization.compute_grad_norm", f"false needs offload.stage=1 or 2, not {stage}; leave it out"
        if config.optimizer.gradient_clipping:
            yield (
                "zero_optimization.compute_grad_norm",
                f"false contradicts optimizer.gradient_clipping={config.optimizer.gradient_clipping:g}, which needs the norm; "
                "use optimizer.gradient_clipping=0",
            )


def _same_dtype(name: str, precision: str) -> bool:
    names = {"bf16": "bfloat16", "fp16": "float16 half", "fp32": "float32 float"}[precision].split()
    return name.removeprefix("torch.") in (precision, *names)


def _optimizer(config: Config, own: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that the optimizer which this run uses does not take."""
    values, offloaded = settings["optimizer"]["params"], config.offload.optimizer is not OffloadDevice.none
    if config.optimizer.name == "lion":
        kind = "DeepSpeedCPULion" if offloaded else "ldft's Lion"
    elif values.get("torch_adam"):
        kind = "torch's AdamW"
    else:
        kind = "DeepSpeedCPUAdam" if offloaded else "FusedAdam"
    for name in [key.removeprefix(_OF_OPTIMIZER) for key in own if key.startswith(_OF_OPTIMIZER)]:
        key = f"{_OF_OPTIMIZER}{name}"
        if kind.endswith("Lion") and name in ("torch_adam", "adam_w_mode"):
            yield key, f"is a parameter of AdamW, and optimizer.name is {config.optimizer.name}; leave it out"
        if name not in _COMMON | _PARAMETERS[kind]:
            yield key, f"{kind} has no such parameter; leave it out"
        if name == "torch_adam" and own[key] and offloaded and config.memory.pinning is not Pinning.torch:
            yield key, "true allocates the moments outside ldft's arenas; use memory.pinning=torch, or leave it out"
    if (
        values.get("foreach")
        and values.get("fused")
        and any(f"optimizer.params.{n}" in own for n in ("foreach", "fused"))
    ):
        yield (
            "optimizer.params.foreach",
            "`fused` and `foreach` cannot be `True` together; add optimizer.params.fused=false",
        )
