"""Build the model: architecture by transformers, verified before anything large exists; weights drawn by name, so that they depend
only on name and seed."""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager, nullcontext

import deepspeed
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ldft.config import AttentionKind, OffloadDevice, Precision, Weights
from ldft.errors import ConfigError
from ldft.memory.arenas import Arenas
from ldft.preflight import attention
from ldft.preflight.selection import Selection
from ldft.training import attention_kernels, liger_kernels, pretrained, verification
from ldft.training.architecture import hf_config
from ldft.training.attention_kernels import repeated_heads
from ldft.training.deepspeed import arena_hooks, layout, ulysses

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


def build(run: Selection, device: torch.device, arenas: Arenas | None = None) -> PreTrainedModel:
    """The model on `device`, in the compute precision, with weights drawn from train.seed or read from a folder.

    Under ZeRO-3 each parameter is sharded over the ranks when it is created: no rank ever holds a full copy. With arenas, shards in
    host memory are in the arenas from the start. Raises ConfigError if transformers would build another model than the config's.
    """
    config = run.config
    dtype = DTYPES[config.train.precision]
    partitioned = config.offload.stage == 3
    implementation = repeated_heads.NAME if run.repeats_heads else run.attention.name
    if config.launch.sequence_parallel > 1:
        implementation = ulysses.register(implementation, config)
    else:
        attention_kernels.register(implementation)
    architecture = hf_config(config.model)
    _check_attention(run.attention, architecture)
    outline = verification.outline(architecture, config.model)
    verification.check(outline, config, run.attention)
    # Use an explicit context: transformers' own ZeRO-3 switch would draw weights in another order than without ZeRO.
    # Pass no dtype, it follows from the config: DeepSpeed uses a given one only if the device also computes in fp16 (0.19.8).
    construct = deepspeed.zero.Init(config_dict_or_path=run.deepspeed) if partitioned else nullcontext()
    host: AbstractContextManager[None] = nullcontext()
    if arenas is not None and config.offload.parameters is OffloadDevice.cpu:
        # A rank's shard of each parameter, in the model's order.
        shards = [-(-parameter.numel() // config.launch.num_ranks) for parameter in outline.parameters()]
        host = arena_hooks.weights(arenas, shards, dtype)
    with host, construct, no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation=implementation)
    model.tie_weights()
    from_files = config.model.weights is Weights.pretrained
    initialize(model, config.train.seed, partitioned=partitioned, only_buffers=from_files)
    if from_files:
        pretrained.load(model, config.model, partitioned=partitioned)
    if config.launch.sequence_parallel > 1:
        ulysses.show_whole_length(model, config)
    if run.liger:
        liger_kernels.apply(model)
    if config.lora.rank:
        from ldft.training import lora  # peft takes a second to import

        lora.add(model, config, run.deepspeed, device)
    model.train()
    return model


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
