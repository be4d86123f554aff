"""The DeepSpeed engine around a model."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import pydantic
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from transformers import PreTrainedModel

from ldft.config import OffloadDevice
from ldft.errors import ConfigError
from ldft.memory.arenas import Arenas
from ldft.preflight.selection import Selection
from ldft.training import schedule
from ldft.training.deepspeed import arena_hooks, audit, fused_step, layout, rebinding, roles, ulysses
from ldft.training.optimizers.device_lion import DeviceLion
from ldft.training.optimizers.host_optimizer import HostAdamW, HostLion

# The section that each of DeepSpeed's models of a section reads.
_SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedBF16Config": "bf16",
    "CompileConfig": "compile",
    "CommsLoggerConfig": "comms_logger",
    "DeepSpeedMonitorConfig": "",
}
# Start of DeepSpeed's message -> the key, for values that need the model or the environment.
_REFUSED_LATE = {
    "Failed to import lower precision safe module": "torch_autocast.lower_precision_safe_modules",
    "No modules of type": "zero_optimization.leaf_module.classes",
}


def check(settings: dict[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed refuses a value, or if a folder that it would write to cannot be created, and
    UnknownLayoutError if this release lacks a name that ldft reads. Needs the process group."""
    layout.require_known_names(settings["zero_optimization"]["stage"])
    try:
        DeepSpeedConfig(settings)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(filter(None, ["offload.deepspeed", _SECTIONS.get(error.title, ""), *map(str, first["loc"])]))
        # A check of a whole section has no location, and the section as its input.
        value = f"{first['input']!r}: " if first["loc"] else ""
        raise ConfigError(key, f"{value}DeepSpeed refuses it: {first['msg']}") from error
    except (DeepSpeedConfigError, AssertionError, ValueError) as error:
        raise ConfigError("offload.deepspeed", f"DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    _create_folders(settings)


def _create_folders(settings: dict[str, Any]) -> None:
    """Create the folders that DeepSpeed's monitors and profiler write to: they would fail only when they write."""
    for section, name in (
        ("csv_monitor", "output_path"),
        ("tensorboard", "output_path"),
        ("flops_profiler", "output_file"),
    ):
        values = settings.get(section, {})
        if not values.get("enabled") or not values.get(name):
            continue
        path = Path(values[name])
        folder = path.parent if name == "output_file" else path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if name == "output_file" and path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise ConfigError(
                f"offload.deepspeed.{section}.{name}",
                f"cannot write {path} ({error.strerror}); name a path that you can write to",
            ) from None


def build(run: Selection, model: PreTrainedModel, arenas: Arenas | None) -> Any:
    """The engine, with the learning-rate schedule; its `get_lr()` returns the rate of the next update.

    With arenas, every offloaded tensor, including the moments, is in its role's arena. Raises HostMemoryError and AuditError, and
    ConfigError for values that DeepSpeed refuses only now.
    """

    config, settings = run.config, run.deepspeed

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: schedule.factor(config, update))

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own: torch.optim.Optimizer | None = None
    if run.fused_step:
        own = (HostLion if config.optimizer.name == "lion" else HostAdamW)(trainable, **settings["optimizer"]["params"])
    elif config.optimizer.name == "lion" and config.offload.optimizer is OffloadDevice.none:
        own = DeviceLion(trainable, **settings["optimizer"]["params"])
    shared = run.fused_step and config.offload.stage == 3 and not fused_step.missing_names()
    device = torch.device("cuda", torch.cuda.current_device()) if run.gpu_share else None
    with arena_hooks.engine(arenas, shared_gradients=shared, first_on=device):
        try:
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=own,
                model_parameters=trainable,
                config=settings,
                lr_scheduler=scheduler,
                mpu=ulysses.groups(config),
            )
        except ValueError as error:
            key = next((key for start, key in _REFUSED_LATE.items() if str(error).startswith(start)), None)
            if key is None:
                raise
            raise ConfigError(f"offload.deepspeed.{key}", f"DeepSpeed refuses it: {error}; name what exists") from error
    layout.require_known_layout(engine.optimizer)
    if run.fused_step:
        fused_step.install(engine, overlap=run.overlap_step, share=run.gpu_share > 0)
    if arenas is not None:
        rebinding.settle(engine, arenas)
        audit.check([*roles.tensors(engine)], arenas)
    return engine
