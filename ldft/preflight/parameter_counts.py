"""Number and sizes of a model's parameters. Imports no torch."""

from __future__ import annotations

from collections import Counter

from ldft.config import Config, ModelConfig, Precision
from ldft.errors import ConfigError
from ldft.preflight import decoder_layers
from ldft.preflight.decoder_layers import Layer


def layer_sizes(model: ModelConfig) -> Counter[int]:
    """Elements -> number of parameters of that size in one decoder layer, the largest."""
    return decoder_layers.largest(model).sizes


@decoder_layers.remembered
def parameter_sizes(model: ModelConfig) -> Counter[int]:
    """Elements -> number of parameters of that size in the model; a tied embedding counts once."""
    parts = decoder_layers.parts(model)
    sizes = Counter(parts.outside)
    for layer, layers in parts.layers.items():
        for size, count in layer.sizes.items():
            sizes[size] += layers * count
    return sizes


def adapted(config: Config, layer: Layer) -> dict[str, tuple[int, int]]:
    """The linear modules of a decoder layer that have an adapter, as in Layer.linears."""
    named = config.lora.target_modules
    found = layer.linears if config.lora.rank else {}
    return {name: shape for name, shape in found.items() if not named or any(_is(name, one) for one in named)}


def _is(module: str, name: str) -> bool:
    """Whether peft takes the name for this module: it is its path, or the end of it."""
    return f".{module}".endswith(f".{name}")


def trained_sizes(config: Config) -> Counter[int]:
    """Elements -> number of trained parameters of that size: all, or those of the adapters."""
    model, rank, named = config.model, config.lora.rank, config.lora.target_modules
    if not rank:
        return parameter_sizes(model)
    sizes: Counter[int] = Counter()
    for layer, layers in decoder_layers.kinds(model).items():
        for inputs, outputs in adapted(config, layer).values():
            sizes[rank * inputs] += layers
            sizes[rank * outputs] += layers
    if "lm_head" in named:
        sizes.update((rank * model.hidden_size, rank * model.vocab_size))
    return sizes


def check_adapted(config: Config) -> None:
    """Raise ConfigError if lora.target_modules names a module that the model lacks."""
    model = config.model
    for name in config.lora.target_modules:
        modules = [module for layer in decoder_layers.kinds(model) for module in layer.linears]
        if name != "lm_head" and not any(_is(module, name) for module in modules):
            known = dict.fromkeys(module.rpartition(".")[2] for module in modules)
            experts = "; the weights of experts have no adapters" if model.num_experts else ""
            raise ConfigError(
                "lora.target_modules",
                f"'{name}' is not a linear layer of {model.name}; use {', '.join([*known, 'lm_head'])}{experts}",
            )


def frozen_sizes(config: Config) -> Counter[int]:
    """Elements -> number of frozen parameters of that size: with adapters, the whole model."""
    return parameter_sizes(config.model) if config.lora.rank else Counter()


def width(config: Config) -> int:
    """Bytes per number in compute precision."""
    return 4 if config.train.precision is Precision.fp32 else 2


def state_bytes(config: Config) -> int:
    """Bytes of a trained parameter's master weight and moments: 12, with Lion 8."""
    return 8 if config.optimizer.name == "lion" else 12


def embedding_parameters(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of the largest decoder layer."""
    return total(layer_sizes(model))


def num_parameters(model: ModelConfig) -> int:
    """Number of parameters of the model; a tied embedding counts once."""
    return total(parameter_sizes(model))


def total(sizes: Counter[int]) -> int:
    return sum(size * count for size, count in sizes.items())


def split(sizes: Counter[int], ranks: int) -> int:
    """Elements that each rank holds under ZeRO-3, which pads every parameter to a multiple of the ranks."""
    return sum(-(-size // ranks) * count for size, count in sizes.items())
