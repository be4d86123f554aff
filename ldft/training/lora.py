"""Low-rank adapters by peft: added to the frozen weights, sharded over the ranks like them, initialised by name."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from typing import Any

import deepspeed
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ldft.config import Config, LoraConfig
from ldft.errors import ConfigError

_ADAPTER = "default"


def add(model: PreTrainedModel, config: Config, deepspeed_config: dict[str, Any], device: torch.device) -> None:
    """Freeze the model and add adapters to its linear layers, in place; existing names do not change.

    Under ZeRO-3 each adapter is sharded over the ranks when it is created, like the model. Raises ConfigError if a layer in
    lora.target_modules does not exist.
    """
    dtype, partitioned = model.dtype, config.offload.stage == 3
    construct = deepspeed.zero.Init(config_dict_or_path=deepspeed_config) if partitioned else nullcontext()
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with construct, device:
            inject(model, config.lora)
    except ValueError as error:
        raise ConfigError(
            "lora.target_modules", f"{config.lora.target_modules}: {' '.join(str(error).split())}"
        ) from error
    finally:
        torch.set_default_dtype(previous)
    draw(model, config.train.seed, partitioned=partitioned)


def inject(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Freeze the model and put uninitialised adapters on lora.target_modules or, if empty, on every linear layer but the output
    projection. Raises ValueError if a layer does not exist.

    Weights of experts get none. Of some mixtures of experts peft (0.21) would adapt them too, for adapters from the time when each
    expert had linear layers of its own, and compute the adapted weights of all experts for it. It knows these models by their
    config, hence the module around the model, which has none.
    """
    head, around = model.get_output_embeddings(), nn.Module()
    around.add_module("model", model)
    # Not their subclasses, e.g. routers that return more than a product.
    linear = [name for name, module in around.named_modules() if type(module) is nn.Linear and module is not head]
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2.0 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or linear,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    peft.inject_adapter_in_model(settings, around)


@torch.no_grad()
def draw(model: PreTrainedModel, seed: int, *, partitioned: bool) -> None:
    """Initialise adapters so that they add nothing: A as in peft (Kaiming uniform), from a seed derived from its name; B zero.

    Adapters are the same for any number of ranks and any ZeRO stage, on one device type.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        with deepspeed.zero.GatheredParameters([down, up], modifier_rank=0) if partitioned else nullcontext():
            torch.manual_seed(seed ^ zlib.crc32(f"{name}.lora".encode()))
            torch.nn.init.kaiming_uniform_(down, a=5**0.5)
            torch.nn.init.zeros_(up)
