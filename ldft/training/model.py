"""Build the model from the config: architecture by transformers, weights drawn by name, so that they depend on nothing else."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ldft.config import Config, ModelConfig, Precision
from ldft.config.checkpointing import CheckpointingMode

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def hf_config(model: ModelConfig) -> PretrainedConfig:
    """The architecture as a transformers config."""
    rope = {"rope_type": "default", **model.rope_scaling, "rope_theta": model.rope_theta}
    return AutoConfig.for_model(
        model.family,
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=rope,
        tie_word_embeddings=model.tie_word_embeddings,
        use_cache=False,
        # Random tokens and models of our own have no special tokens; a padding index would zero an embedding row.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **model.extra,
    )


def build(config: Config, deepspeed_config: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The model on `device`, in the compute precision, initialised from train.seed.

    Under ZeRO-3 each parameter is split over the ranks as it is made: no rank ever holds a full copy.
    """
    dtype = DTYPES[config.train.precision]
    partitioned = config.offload.stage == 3
    # transformers' own ZeRO-3 switch would draw weights in another order than without ZeRO; hence the explicit context.
    construct = deepspeed.zero.Init(config_dict_or_path=deepspeed_config, dtype=dtype) if partitioned else nullcontext()
    with construct, no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(hf_config(config.model), dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    initialize(model, config.train.seed, partitioned=partitioned)
    if config.checkpointing.mode is CheckpointingMode.gpu:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int, *, partitioned: bool) -> None:
    """Draw every module's weights as its family prescribes, each from a seed of its own name.

    So the same config gives the same weights for any number of ranks and any ZeRO stage, on one device type.
    """

    def visit(module: nn.Module, name: str, owner: PreTrainedModel) -> None:
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}", child if isinstance(child, PreTrainedModel) else owner)
        parameters = list(module.parameters(recurse=False))
        if not parameters and not list(module.buffers(recurse=False)):
            return
        gathered = (
            deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
            if partitioned and parameters
            else nullcontext()
        )
        with gathered:
            torch.manual_seed(seed ^ zlib.crc32(name.encode()))
            owner._init_weights(module)

    visit(model, "", model)


def num_parameters(model: PreTrainedModel, *, trainable: bool = False) -> int:
    """Parameters of the model, shared ones once, also where ZeRO-3 has split them."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in model.parameters()
        if parameter.requires_grad or not trainable
    )
