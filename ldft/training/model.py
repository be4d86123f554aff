"""Build the model from the config: architecture by transformers, weights drawn by name, so that they depend only on name and
seed."""

from __future__ import annotations

import difflib
import zlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ldft.config import AttentionKind, ModelConfig, OffloadDevice, Precision, Weights
from ldft.errors import ConfigError
from ldft.memory.arenas import Arenas
from ldft.preflight import attention, families
from ldft.preflight.selection import Selection
from ldft.training import attention_kernels, liger_kernels, pretrained
from ldft.training.attention_kernels import repeated_heads
from ldft.training.deepspeed import arena_hooks, layout

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


def hf_config(model: ModelConfig) -> PretrainedConfig:
    """The architecture as a transformers config. Raises ConfigError if transformers cannot build it."""
    families.check(model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    family = CONFIG_MAPPING[model.family]
    values: dict[str, Any] = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", **model.rope_scaling, "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": False,
        # Random tokens and ldft's own models have no special tokens; a padding index would zero an embedding row.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.family == "qwen2":
        values["use_sliding_window"] = model.sliding_window > 0
    optional = {
        "sliding_window": ("sliding_window", model.sliding_window),
        "attn_logit_softcapping": ("attention_softcap", model.attention_softcap),
        "final_logit_softcapping": ("logit_softcap", model.logit_softcap),
    }
    for name, (key, value) in optional.items():
        if hasattr(family, name):
            values[name] = value or None  # keep the family's own default from applying
        elif value:
            raise ConfigError(f"model.{key}", f"{value:g}: transformers' {model.family} does not support it; use 0")
    rope_type = values["rope_parameters"]["rope_type"]
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        allowed = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
        raise ConfigError("model.rope_scaling.rope_type", f"'{rope_type}' does not exist; use one of {allowed}")
    for name in model.extra:
        if name in values:
            raise ConfigError(
                f"model.extra.{name}", "ldft sets this from another key of its config; see the keys of model"
            )
        if not hasattr(family, name):
            close = difflib.get_close_matches(name, [key for key in vars(family) if not key.startswith("_")], n=1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise ConfigError(f"model.extra.{name}", f"transformers' {model.family} has no such key; {hint}")
    try:
        return AutoConfig.for_model(model.family, **values, **model.extra)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError("model", f"transformers refuses this {model.family}: {reason}") from error


def build(run: Selection, device: torch.device, arenas: Arenas | None = None) -> PreTrainedModel:
    """The model on `device`, in the compute precision, with weights drawn from train.seed or read from a folder.

    Under ZeRO-3 each parameter is sharded over the ranks when it is created: no rank ever holds a full copy. With arenas, shards in
    host memory are in the arenas from the start.
    """
    config = run.config
    dtype = DTYPES[config.train.precision]
    partitioned = config.offload.stage == 3
    implementation = repeated_heads.NAME if run.repeats_heads else run.attention.name
    attention_kernels.register(implementation)
    architecture = hf_config(config.model)
    _check_attention(run.attention, architecture)
    # Use an explicit context: transformers' own ZeRO-3 switch would draw weights in another order than without ZeRO.
    # Pass no dtype, it follows from the config: DeepSpeed uses a given one only if the device also computes in fp16 (0.19.8).
    construct = deepspeed.zero.Init(config_dict_or_path=run.deepspeed) if partitioned else nullcontext()
    host: AbstractContextManager[None] = nullcontext()
    if arenas is not None and config.offload.parameters is OffloadDevice.cpu:
        host = arena_hooks.weights(arenas, _parts(architecture, config.launch.num_ranks), dtype)
    with host, construct, no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=implementation)
    model.tie_weights()
    from_files = config.model.weights is Weights.pretrained
    initialize(model, config.train.seed, partitioned=partitioned, only_buffers=from_files)
    if from_files:
        pretrained.load(model, config.model, partitioned=partitioned)
    if run.liger:
        liger_kernels.apply(model)
    if config.lora.rank:
        from ldft.training import lora  # peft takes a second to import

        lora.add(model, config, run.deepspeed, device)
    model.train()
    return model


def _parts(architecture: PretrainedConfig, ranks: int) -> list[int]:
    """Elements of a rank's shard of each parameter under ZeRO-3, in the model's order, from a model on the meta device."""
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    model.tie_weights()
    return [-(-parameter.numel() // ranks) for parameter in model.parameters()]


def _check_attention(kind: AttentionKind, architecture: PretrainedConfig) -> None:
    """Raise ConfigError if transformers does not have this attention for this family."""
    network = MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)]
    flag = attention.SPECS[kind].family_flag
    if not flag or getattr(network, flag):
        return
    raise ConfigError(
        "attention.kind", f"{kind.name}: transformers' {architecture.model_type} does not support it; use eager"
    )


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int, *, partitioned: bool, only_buffers: bool = False) -> None:
    """Draw every module's weights as its family prescribes, each from a seed derived from the module's name.

    So the same config gives the same weights for any number of ranks and any ZeRO stage, on one device type.

    only_buffers: skip modules without buffers, since their parameters are read from files anyway.
    """

    def visit(module: nn.Module, name: str, owner: PreTrainedModel) -> None:
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}", child if isinstance(child, PreTrainedModel) else owner)
        parameters = list(module.parameters(recurse=False))
        buffers = list(module.buffers(recurse=False))
        if not buffers and (only_buffers or not parameters):
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
    """Number of parameters of the model, counting shared ones once and sharded ones (ZeRO-3) in full."""
    return sum(
        layout.whole_numel(parameter) for parameter in model.parameters() if parameter.requires_grad or not trainable
    )
