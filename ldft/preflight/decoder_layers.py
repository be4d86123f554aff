"""The parameters of one decoder layer, family by family. Imports no torch.

Llama's layer is the pattern: four projections of attention, three of the MLP, two norms. A row of FAMILIES says how a family
differs. In a mixture of experts the MLP of some or all layers is replaced by experts: a router, E x H; the experts' gate and up
projections as one weight of three dimensions, E x 2 I x H; and their down projections, E x H x I (transformers 5; some families
store them transposed, which has the same size).
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
# Modules that make queries, keys and values.
PROJECTIONS = (*_QKV, "qkv_proj")


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
# Families with exact counts, which a test compares with transformers. Others are counted as Llama.
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
def kinds(model: ModelConfig) -> Counter[bool]:
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


def linears(model: ModelConfig, sparse: bool) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the linear modules of a decoder layer with experts, if `sparse`, or without."""
    family, hidden = of(model), model.hidden_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    found: dict[str, tuple[int, int]] = {}
    if family.fused_attention:
        found["qkv_proj"] = hidden, queries + 2 * keys
    else:
        found |= {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    found["o_proj"] = queries, hidden
    inner = shared_width(model) if sparse else model.intermediate_size
    if inner and family.fused_mlp:
        found["gate_up_proj"] = hidden, 2 * inner
    elif inner:
        found |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    if inner:
        found["down_proj"] = inner, hidden
    if sparse and inner:
        found["shared_expert_gate"] = hidden, 1
    return found


def expert_matrices(model: ModelConfig) -> tuple[int, int]:
    """Elements of the experts' gate and up projections, and of their down projections, of all experts of a layer."""
    all_widths = model.num_experts * experts.expert_width(model)
    return 2 * all_widths * model.hidden_size, all_widths * model.hidden_size


@remembered
def sizes(model: ModelConfig, sparse: bool) -> Counter[int]:
    """Elements -> number of parameters of that size in one decoder layer."""
    family, modules = of(model), linears(model, sparse)
    found = Counter(inputs * outputs for inputs, outputs in modules.values())
    for key, names in family.biases.items():
        if model.extra.get(key, family.biased):
            found.update(modules[name][1] for name in names if name in modules)
    found[model.hidden_size] += family.norms
    if family.head_norms is HeadNorms.one_head:
        found[model.head_dim] += 2
    elif family.head_norms is HeadNorms.all_heads:
        found.update(heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    if family.sinks:
        found[model.num_attention_heads] += 1
    if sparse:
        number, inner = model.num_experts, experts.expert_width(model)
        found.update((number * model.hidden_size, *expert_matrices(model)))
        if family.expert_biases:
            found.update((number, number * 2 * inner, number * model.hidden_size))
    return found


@remembered
def largest(model: ModelConfig) -> bool:
    """Whether the kind of layer with most parameters is the one with experts."""
    return max(kinds(model), key=lambda sparse: sum(size * count for size, count in sizes(model, sparse).items()))
