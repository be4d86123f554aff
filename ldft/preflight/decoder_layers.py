"""The parameters of a model: those of each kind of decoder layer, and those outside the layers. Imports no torch.

Llama's layer is the pattern: four projections of attention, three of the MLP, two norms. A row of FAMILIES says how a family
differs. In a mixture of experts the MLP of some or all layers is replaced by experts: a router, E x H; the experts' gate and up
projections as one weight of three dimensions, E x 2 I x H; and their down projections, E x H x I (transformers 5; some families
store them transposed, which has the same size).

A family without a row is built instead, on torch's meta device. That takes seconds and torch, so it is left to `builder`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from operator import attrgetter
from typing import Concatenate, ParamSpec, TypeVar

from ldft.config import ModelConfig
from ldft.preflight import experts

_QKV = ("q_proj", "k_proj", "v_proj")
_QKVO = (*_QKV, "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """Parameters of one kind of decoder layer."""

    linears: Mapping[str, tuple[int, int]]
    """Name -> (inputs, outputs) of its linear modules in the order in which they compute, attention's first."""
    of_attention: int
    """How many of them are attention's. The last of those is its output projection, the others make queries, keys and values."""
    sizes: Counter[int]
    """Elements -> number of parameters of that size."""
    experts: tuple[int, ...] = ()
    """Elements of the experts' matrices, each of all experts together; none in a layer without experts."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Parameters of a model."""

    layers: Counter[Layer]
    """Each kind of decoder layer, and how many there are."""
    outside: Counter[int]
    """Elements -> number of parameters of that size outside the layers; a tied embedding counts once."""


builder: Callable[[ModelConfig], Parts] | None = None
"""Builds a model whose family has no row. Set where torch may be imported (ldft/runner/__init__.py)."""


class HeadNorms(Enum):
    """Norms of queries and keys: none; one head wide, shared by all; as wide as all heads together."""

    none = "none"
    one_head = "one_head"
    all_heads = "all_heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Differences of a family's parameters from Llama's."""

    fused_attention: bool = False
    """Whether queries, keys and values are one matrix."""
    fused_mlp: bool = False
    """Whether gate and up are one matrix."""
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Key of the family's config -> linear modules that have a bias if it is true."""
    biased: bool = False
    """Whether these keys are true by default."""
    norms: int = 2
    """Norms as wide as the residual stream."""
    norm_after_mlp: bool = False
    """Whether a norm reads the MLP's output before the residual stream does."""
    head_norms: HeadNorms = HeadNorms.none
    sinks: bool = False
    """Whether attention has one number for each query head."""
    expert_biases: bool = False
    """Whether router and experts have biases."""
    kept_by_expert: int = 4
    """Arrays of its own width that an expert keeps for the backward pass: two halves, the activation of one, their product."""
    shared_width: int = 0
    """Default width of the expert that computes every token, behind a gate of one output; 0 for none."""
    mixed: bool = False
    """Whether layers without experts are possible: `mlp_only_layers`, `decoder_sparse_step`."""


_ATTENTION_BIAS = {"attention_bias": _QKVO}
# Families with formulas, which a test compares with transformers. Others are built.
FAMILIES = {
    "llama": Family(biases={**_ATTENTION_BIAS, "mlp_bias": _MLP}),
    "mistral": Family(),
    "phi3": Family(fused_attention=True, fused_mlp=True),
    "qwen2": Family(biases={"qkv_bias": _QKV}, biased=True),
    "qwen3": Family(biases=_ATTENTION_BIAS, head_norms=HeadNorms.one_head),
    "gemma": Family(biases=_ATTENTION_BIAS),
    "gemma2": Family(biases=_ATTENTION_BIAS, norms=4, norm_after_mlp=True),
    "gemma3_text": Family(biases=_ATTENTION_BIAS, norms=4, norm_after_mlp=True, head_norms=HeadNorms.one_head),
    "olmo2": Family(biases=_ATTENTION_BIAS, norm_after_mlp=True, head_norms=HeadNorms.all_heads),
    "olmo3": Family(biases=_ATTENTION_BIAS, norm_after_mlp=True, head_norms=HeadNorms.all_heads),
    "glm4": Family(biases={"attention_bias": _QKV}, biased=True, norms=4, norm_after_mlp=True, fused_mlp=True),
    "smollm3": Family(biases={**_ATTENTION_BIAS, "mlp_bias": _MLP}),
    "granite": Family(biases={**_ATTENTION_BIAS, "mlp_bias": _MLP}),
    "mixtral": Family(),
    "qwen2_moe": Family(biases={"qkv_bias": _QKV}, biased=True, shared_width=5632, mixed=True),
    "qwen3_moe": Family(biases=_ATTENTION_BIAS, head_norms=HeadNorms.one_head, mixed=True),
    "gpt_oss": Family(biases=_ATTENTION_BIAS, biased=True, sinks=True, expert_biases=True, kept_by_expert=7),
    "granitemoe": Family(biases=_ATTENTION_BIAS),
}


_Rest = ParamSpec("_Rest")
_Found = TypeVar("_Found")
_values = attrgetter(*(field.name for field in fields(ModelConfig) if field.name not in ("extra", "rope_scaling")))


def remembered(
    function: Callable[Concatenate[ModelConfig, _Rest], _Found],
) -> Callable[Concatenate[ModelConfig, _Rest], _Found]:
    """The function, which computes once for the same values of a model: choosing a plan asks thousands of times. Callers must not
    change what it returns."""
    known: dict[tuple[object, ...], _Found] = {}

    def ask(model: ModelConfig, /, *rest: _Rest.args, **named: _Rest.kwargs) -> _Found:
        key = (_values(model), repr(model.extra), rest, *named.items())
        if key not in known:
            known[key] = function(model, *rest, **named)
        return known[key]

    return functools.update_wrapper(ask, function)


def of(model: ModelConfig) -> Family:
    return FAMILIES.get(model.family, Family())


@remembered
def parts(model: ModelConfig) -> Parts:
    """Raises ConfigError if transformers cannot build a model whose family has no row."""
    if model.family not in FAMILIES:
        assert builder is not None, "set by ldft.runner"
        return builder(model)
    layers = Counter({_layer(model, sparse): count for sparse, count in _kinds(model).items()})
    embedding = model.vocab_size * model.hidden_size
    return Parts(layers, Counter({embedding: 1 if model.tie_word_embeddings else 2}) + Counter([model.hidden_size]))


def kinds(model: ModelConfig) -> Counter[Layer]:
    """Each kind of decoder layer, and how many there are."""
    return parts(model).layers


@remembered
def largest(model: ModelConfig) -> Layer:
    """The kind of layer with most parameters."""
    return max(kinds(model), key=lambda layer: sum(size * count for size, count in layer.sizes.items()))


def last_product(model: ModelConfig, layer: Layer) -> str:
    """Name of the linear module that returns from the MLP to the residual stream; empty if only experts do."""
    of_mlp = [*layer.linears.items()][layer.of_attention :]
    return next((name for name, (_, outputs) in reversed(of_mlp) if outputs == model.hidden_size), "")


def _kinds(model: ModelConfig) -> Counter[bool]:
    """Number of decoder layers with experts (True) and without."""
    if not model.num_experts:
        return Counter({False: model.num_layers})
    if not of(model).mixed:
        return Counter({True: model.num_layers})
    dense, step = model.extra.get("mlp_only_layers") or (), model.extra.get("decoder_sparse_step", 1)
    return Counter(index not in dense and (index + 1) % step == 0 for index in range(model.num_layers))


def shared_width(model: ModelConfig) -> int:
    """Width of the expert that computes every token, elements; 0 for none."""
    default = of(model).shared_width
    return int(model.extra.get("shared_expert_intermediate_size", default)) if default else 0


def _attention(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of attention's linear modules."""
    hidden = model.hidden_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if of(model).fused_attention:
        return {"qkv_proj": (hidden, queries + 2 * keys), "o_proj": (queries, hidden)}
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }


def _mlp(model: ModelConfig, sparse: bool) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the linear modules of an MLP with experts, if `sparse`, or without."""
    hidden, inner = model.hidden_size, shared_width(model) if sparse else model.intermediate_size
    if not inner:
        return {}
    ahead = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    if of(model).fused_mlp:
        ahead = {"gate_up_proj": (hidden, 2 * inner)}
    return ahead | {"down_proj": (inner, hidden)} | ({"shared_expert_gate": (hidden, 1)} if sparse else {})


def _layer(model: ModelConfig, sparse: bool) -> Layer:
    """A decoder layer with experts, if `sparse`, or without."""
    family, attention = of(model), _attention(model)
    modules = attention | _mlp(model, sparse)
    sizes = Counter(inputs * outputs for inputs, outputs in modules.values())
    for key, names in family.biases.items():
        if model.extra.get(key, family.biased):
            sizes.update(modules[name][1] for name in names if name in modules)
    sizes[model.hidden_size] += family.norms
    if family.head_norms is HeadNorms.one_head:
        sizes[model.head_dim] += 2
    elif family.head_norms is HeadNorms.all_heads:
        sizes.update(heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    if family.sinks:
        sizes[model.num_attention_heads] += 1
    matrices: tuple[int, ...] = ()
    if sparse:
        number, inner = model.num_experts, experts.expert_width(model)
        matrices = (number * 2 * inner * model.hidden_size, number * inner * model.hidden_size)
        sizes.update((number * model.hidden_size, *matrices))
        if family.expert_biases:
            sizes.update((number, number * 2 * inner, number * model.hidden_size))
    return Layer(linears=modules, of_attention=len(attention), sizes=sizes, experts=matrices)
