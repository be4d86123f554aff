"""Low-rank adapters by peft: beside the frozen weights, split over the ranks like them, drawn by name."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from typing import Any

import deepspeed
import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from ldft.config import Config, LoraConfig
from ldft.errors import ConfigError

_ADAPTER = "default"


def add(model: PreTrainedModel, config: Config, deepspeed_config: dict[str, Any], device: torch.device) -> None:
    """Freeze the model and put adapters beside its linear layers, in place; the names of what was there stay the same.

    Under ZeRO-3 each adapter is split over the ranks as it is made, as the model was. Raises ConfigError where a layer that
    lora.target_modules names does not exist.
    """
    dtype, partitioned = model.dtype, config.offload.stage == 3
    construct = deepspeed.zero.Init(config_dict_or_path=deepspeed_config) if partitioned else nullcontext()
    settings = _peft_config(config.lora)
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with construct, device:
            peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigError(
            "lora.target_modules", f"{config.lora.target_modules}: {' '.join(str(error).split())}"
        ) from error
    finally:
        torch.set_default_dtype(previous)
    draw(model, config.train.seed, partitioned=partitioned)


def _peft_config(lora: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2.0 * lora.rank,
        lora_dropout=lora.dropout,
        # peft's name for every linear layer but the output projection.
        target_modules=lora.target_modules or "all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )


@torch.no_grad()
def draw(model: PreTrainedModel, seed: int, *, partitioned: bool) -> None:
    """The usual start, adapters that add nothing: A as peft draws it (Kaiming uniform), from a seed of its own name; B zero.

    Same adapters for any number of ranks and any ZeRO stage, on one device type.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        with deepspeed.zero.GatheredParameters([down, up], modifier_rank=0) if partitioned else nullcontext():
            torch.manual_seed(seed ^ zlib.crc32(f"{name}.lora".encode()))
            torch.nn.init.kaiming_uniform_(down, a=5**0.5)
            torch.nn.init.zeros_(up)
