"""The parameters of a model whose family preflight has no formula for, read from the model that transformers builds."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ldft.config import ModelConfig
from ldft.preflight.decoder_layers import Layer, Parts
from ldft.training import verification
from ldft.training.architecture import hf_config
from ldft.training.checkpointing.checkpointing import decoder_layers
from ldft.training.hf_import import quiet


def of(model: ModelConfig) -> Parts:
    """Nothing large is allocated. Raises ConfigError if transformers cannot build the model."""
    with quiet():
        network = verification.outline(hf_config(model), model)
    counted: set[int] = set()
    # Layers are grouped by what they hold: most models have one or two kinds.
    kinds: dict[str, Layer] = {}
    layers: Counter[Layer] = Counter()
    for module in decoder_layers(network) or _listed(network, model.num_layers):
        layer = _layer(module, model, counted)
        layers[kinds.setdefault(repr(layer), layer)] += 1
    return Parts(layers, _sizes(network, counted))


def _listed(network: nn.Module, number: int) -> list[nn.Module]:
    """The layers of a model that transformers cannot recompute: its first list of so many modules, or else the model itself."""
    lists = (list(one) for one in network.modules() if isinstance(one, nn.ModuleList) and len(one) == number)
    return next(lists, [network])


def _sizes(module: nn.Module, counted: set[int]) -> Counter[int]:
    """Elements -> number of the module's parameters of that size, but of those counted before: layers may share them."""
    new = [parameter for parameter in module.parameters() if id(parameter) not in counted]
    counted.update(map(id, new))
    return Counter(parameter.numel() for parameter in new)


def _layer(module: nn.Module, model: ModelConfig, counted: set[int]) -> Layer:
    # As lora.inject: not subclasses, e.g. routers that return more than a product.
    linears = {
        name: (one.in_features, one.out_features) for name, one in module.named_modules() if type(one) is nn.Linear
    }
    attention = [name for name in linears if "att" in name.partition(".")[0]]
    others = [name for name in linears if name not in attention]
    shapes = [parameter.shape for parameter in module.parameters()]
    return Layer(
        linears={name: linears[name] for name in [*attention, *others]},
        of_attention=len(attention),
        sizes=_sizes(module, counted),
        experts=tuple(shape.numel() for shape in shapes if len(shape) == 3 and shape[0] == model.num_experts),
    )
