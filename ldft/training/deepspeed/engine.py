"""The DeepSpeed engine around a model."""

from __future__ import annotations

from contextlib import nullcontext
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
from ldft.training.deepspeed import arena_hooks, audit, fused_step, layout, rebinding, roles
from ldft.training.optimizers.device_lion import DeviceLion
from ldft.training.optimizers.host_optimizer import HostAdamW, HostLion


def check(settings: dict[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed refuses a value, and UnknownLayoutError if this release lacks a name that ldft reads.
    Needs the process group."""
    layout.require_known_names(settings["zero_optimization"]["stage"])
    try:
        DeepSpeedConfig(settings)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError("offload.deepspeed", f"DeepSpeed refuses {key}={first['input']!r}: {first['msg']}") from error
    except (DeepSpeedConfigError, AssertionError, ValueError) as error:
        raise ConfigError("offload.deepspeed", f"DeepSpeed refuses it: {' '.join(str(error).split())}") from error


def build(run: Selection, model: PreTrainedModel, arenas: Arenas | None) -> Any:
    """The engine, with the learning-rate schedule; its `get_lr()` returns the rate of the next update.

    With arenas, every offloaded tensor, including the moments, is in its role's arena. Raises HostMemoryError and AuditError.
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
    with arena_hooks.engine(arenas) if arenas is not None else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=own, model_parameters=trainable, config=settings, lr_scheduler=scheduler
        )
    layout.require_known_layout(engine.optimizer)
    if run.fused_step:
        fused_step.install(engine)
    if arenas is not None:
        rebinding.settle(engine, arenas)
        audit.check([*roles.tensors(engine)], arenas)
    return engine
