"""Number and sizes of a model's parameters by formula. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ldft.config import Config, ModelConfig, Precision
from ldft.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Family:
    """Differences of a family's parameters from Llama's."""

    qkv_bias: bool = False
    norms_per_layer: int = 2
    fused: bool = False
    """Whether queries, keys and values are one matrix, and gate and up another."""


# Families with exact counts, which a test compares with transformers. Others are counted as Llama.
FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "phi3": _Family(fused=True),
    "qwen2": _Family(qkv_bias=True),
    "gemma2": _Family(norms_per_layer=4),
}


def linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the linear modules of one decoder layer."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if FAMILIES.get(model.family, _Family()).fused:
        return {
            "qkv_proj": (hidden, queries + 2 * keys),
            "o_proj": (queries, hidden),
            "gate_up_proj": (hidden, 2 * inner),
            "down_proj": (inner, hidden),
        }
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def layer_sizes(model: ModelConfig) -> Counter[int]:
    """Elements -> number of parameters of that size in one decoder layer."""
    family = FAMILIES.get(model.family, _Family())
    sizes = Counter(inputs * outputs for inputs, outputs in linears(model).values())
    if family.qkv_bias:
        sizes.update(linears(model)[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    sizes[model.hidden_size] += family.norms_per_layer
    return sizes


def parameter_sizes(model: ModelConfig) -> Counter[int]:
    """Elements -> number of parameters of that size in the model; a tied embedding counts once."""
    sizes = Counter({size: model.num_layers * count for size, count in layer_sizes(model).items()})
    sizes[embedding_parameters(model)] += 1 if model.tie_word_embeddings else 2
    sizes[model.hidden_size] += 1
    return sizes


def adapted(config: Config) -> dict[str, tuple[int, int]]:
    """The linear modules of a layer that have an adapter, as in linears()."""
    named = config.lora.target_modules
    found = linears(config.model) if config.lora.rank else {}
    return {name: shape for name, shape in found.items() if not named or name in named}


def trained_sizes(config: Config) -> Counter[int]:
    """Elements -> number of trained parameters of that size: all, or those of the adapters."""
    model, rank, named = config.model, config.lora.rank, config.lora.target_modules
    if not rank:
        return parameter_sizes(model)
    sizes: Counter[int] = Counter()
    for inputs, outputs in adapted(config).values():
        sizes[rank * inputs] += model.num_layers
        sizes[rank * outputs] += model.num_layers
    if "lm_head" in named:
        sizes.update((rank * model.hidden_size, rank * model.vocab_size))
    return sizes


def check_adapted(config: Config) -> None:
    """Raise ConfigError if lora.target_modules names a module that the model lacks. For other families, peft checks it."""
    known = [*linears(config.model), "lm_head"]
    for name in config.lora.target_modules if config.model.family in FAMILIES else ():
        if name not in known:
            raise ConfigError(
                "lora.target_modules", f"'{name}' is not a linear layer of {config.model.name}; use {', '.join(known)}"
            )


def frozen_sizes(config: Config) -> Counter[int]:
    """Elements -> number of frozen parameters of that size: with adapters, the whole model."""
    return parameter_sizes(config.model) if config.lora.rank else Counter()


def width(config: Config) -> int:
    """Bytes per number in compute precision."""
    return 4 if config.train.precision is Precision.fp32 else 2


def embedding_parameters(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one decoder layer."""
    return total(layer_sizes(model))


def num_parameters(model: ModelConfig) -> int:
    """Number of parameters of the model; a tied embedding counts once."""
    return total(parameter_sizes(model))


def total(sizes: Counter[int]) -> int:
    return sum(size * count for size, count in sizes.items())


def split(sizes: Counter[int], ranks: int) -> int:
    """Elements that each rank holds under ZeRO-3, which pads every parameter to a multiple of the ranks."""
    return sum(-(-size // ranks) * count for size, count in sizes.items())
