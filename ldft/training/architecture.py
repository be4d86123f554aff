"""The architecture as a transformers config: ldft's keys under the names that the family reads."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ldft.config import ModelConfig, rope
from ldft.errors import ConfigError
from ldft.preflight import experts, families, windows
from ldft.preflight.windows import WINDOWS_AND_CAPS

# Where ldft's own keys of these names of config.json are.
_ELSEWHERE = {
    rope.PARTIAL: "model.rope_scaling.partial_rotary_factor",
    rope.ORIGINAL: "model.rope_scaling.original_max_position_embeddings",
    "rope_theta": "model.rope_theta",
    "rope_scaling": "model.rope_scaling",
    "rope_parameters": "model.rope_scaling",
}
# What transformers raises for a config that it cannot read or build.
REFUSED = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)


def hf_config(model: ModelConfig) -> PretrainedConfig:
    """The architecture as a transformers config. Raises ConfigError if transformers cannot build it."""
    families.check(model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    asked = model.rope_parameters()
    known = ("default", *ROPE_INIT_FUNCTIONS)
    for parameters in asked.values():
        if parameters["rope_type"] not in known:
            raise ConfigError(
                "model.rope_scaling.rope_type",
                f"'{parameters['rope_type']}' does not exist in this transformers; use one of {', '.join(known)}",
            )
    values: dict[str, Any] = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": False,
        # Random tokens and ldft's own models have no special tokens; a padding index would zero an embedding row.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **experts.keys(model, partial(hasattr, CONFIG_MAPPING[model.family])),
        **_windows_and_caps(model),
    }
    if reads(model.family, "qk_rope_head_dim") or isinstance(
        getattr(CONFIG_MAPPING[model.family], "head_dim", None), property
    ):
        # The family makes a head's width from other keys, and would confuse it with this one. It is verified like the others.
        del values["head_dim"]
    extra = _extra(model, {*values, *_ELSEWHERE})
    # Phi 3 reads the published length beside the other parameters and prefers it to the one among them.
    if reads(model.family, rope.ORIGINAL) and rope.ORIGINAL in asked.get("", {}):
        values[rope.ORIGINAL] = asked[""][rope.ORIGINAL]
    own = _made(model, values | extra)
    parameters = _rope_parameters(model, asked, own)
    architecture = _made(model, values | extra | {"rope_parameters": parameters}, "model.rope_scaling")
    # transformers reads this parameter of YaRN beside the layer types, not among them (5.23), and would not accept it there (5.17).
    for one in parameters_by_layer_type(architecture).values():
        if "truncate" in one:
            architecture.rope_parameters["truncate"] = one["truncate"]
    return architecture


def _made(model: ModelConfig, values: dict[str, Any], key: str = "model") -> PretrainedConfig:
    """The config, or ConfigError for `key`, which is what the config did not have when it was last made without an error."""
    try:
        # A copy, because transformers adds to the dicts and lists that it is given.
        return AutoConfig.for_model(model.family, **copy.deepcopy(values))
    except REFUSED as error:
        reason = " ".join(str(error.__cause__ or error).split())
        named = re.match(r"Field '(\w+)'", reason)
        key = f"model.{WINDOWS_AND_CAPS[named[1]]}" if named and named[1] in WINDOWS_AND_CAPS else key
        raise ConfigError(key, f"transformers refuses this {model.family}: {reason}") from error


def _windows_and_caps(model: ModelConfig) -> dict[str, Any]:
    """Keys of the attention window and the soft caps, null where off, so that a family's default does not apply."""
    values: dict[str, Any] = {}
    for name, key in WINDOWS_AND_CAPS.items():
        value = getattr(model, key)
        if name == "sliding_window" and not value and windows.WINDOWED not in _layer_types(model):
            continue  # no layer uses it, but some families make a mask of it even so
        if reads(model.family, name):
            values[name] = value or None
        elif value:
            raise windows.unsupported(model, key)
    if reads(model.family, "use_sliding_window"):
        values["use_sliding_window"] = model.sliding_window > 0
    return values


def _layer_types(model: ModelConfig) -> list[Any]:
    """Those that the user named; without any, the family may have layers of each type."""
    named = model.extra.get("layer_types")
    return named if isinstance(named, list) else [windows.WINDOWED]


def _extra(model: ModelConfig, own: set[str]) -> dict[str, Any]:
    """model.extra, checked. own: names that ldft sets from other keys."""
    switch = "use_sliding_window"
    windows.check_switch(model, read=reads(model.family, switch))
    for name, value in model.extra.items():
        at = f"model.extra.{name}"
        if name in (switch, rope.ORIGINAL) and reads(model.family, name):
            continue
        if name in _ELSEWHERE:
            raise ConfigError(at, f"{value} has no effect here; set {_ELSEWHERE[name]}")
        if name in own:
            raise ConfigError(at, "ldft sets this from another key of its config; see the keys of model")
        if not reads(model.family, name):
            close = difflib.get_close_matches(name, _declared(model.family) - own, n=1)
            hint = f"did you mean {close[0]}?" if close else "leave it out"
            raise ConfigError(at, f"transformers' {model.family} has no such key; {hint}")
    return model.extra


@cache
def _declared(family: str) -> frozenset[str]:
    """Keys that the family's transformers config declares, with their other names."""
    kind = CONFIG_MAPPING[family]
    names = {one.name for one in fields(kind)} if is_dataclass(kind) else set(inspect.signature(kind).parameters)
    return frozenset(name for name in {*names, *kind.attribute_map} if not name.startswith("_"))


@cache
def reads(family: str, key: str) -> bool:
    """Whether the family's code reads `key` from its config: the config declares it, or the model's source names it.

    Not every key is declared: Qwen3-MoE reads head_dim, and Gemma 3 sliding_window_pattern, only if the config has them.
    """
    if key in _declared(family):
        return True
    given = re.compile(rf"""kwargs(?:\.(?:get|pop|setdefault)\(|\[)\s*["']{re.escape(key)}["']""")
    constructor = inspect.getsource(sys.modules[CONFIG_MAPPING[family].__module__])
    return given.search(constructor) is not None or read_by_model(family, key)


@cache
def read_by_model(family: str, key: str) -> bool:
    """Whether the source of the family's causal language model names `key` of its config."""
    network = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None)
    read = re.compile(rf"""config\.{re.escape(key)}\b|getattr\(\s*(?:self\.)?config,\s*["']{re.escape(key)}["']""")
    return network is not None and read.search(inspect.getsource(import_module(network.__module__))) is not None


def _rope_parameters(model: ModelConfig, asked: dict[str, dict[str, Any]], own: PretrainedConfig) -> dict[str, Any]:
    """rope_parameters as the family reads them: one dict, or one for each layer type.

    own: the same architecture with the family's own rotary embedding. Parameters without a layer type are those of full
    attention; layers with a window keep the family's, whose base is model.rope_theta where the family has one base for all.
    """
    by_type = parameters_by_layer_type(own)
    rotated = getattr(own, "qk_rope_head_dim", None) or model.head_dim
    if not by_type and "" in asked:
        whole = _share(getattr(own, "rope_parameters", None) or {}) | asked[""]
        rope.check_together(whole, "model.rope_scaling", rotated)
        return whole
    if not by_type:
        raise ConfigError(
            "model.rope_scaling",
            f"transformers' {model.family} has one rotary embedding for all layers; give one set of parameters",
        )
    types = ", ".join(by_type)
    one_base = len({parameters["rope_theta"] for parameters in by_type.values()}) == 1
    bases = {name: parameters["rope_theta"] for name, parameters in by_type.items()}
    bases |= {name: model.rope_theta for name in by_type if one_base or name == "full_attention"}
    if "" in asked:
        if "full_attention" not in by_type:
            raise ConfigError(
                "model.rope_scaling",
                f"transformers' {model.family} reads parameters for each of {types}; give them as model.rope_scaling.<layer type>",
            )
        asked = {"full_attention": asked[""]}
    for name in asked:
        if name not in by_type:
            raise ConfigError(
                f"model.rope_scaling.{name}", f"transformers' {model.family} has no layers of this type; use {types}"
            )
    found: dict[str, Any] = {}
    for name, own_rule in by_type.items():
        found[name] = (
            {"rope_theta": bases[name]} | _share(own_rule) | asked.get(name, own_rule | {"rope_theta": bases[name]})
        )
        rope.check_together(found[name], f"model.rope_scaling.{name}", rotated)
    return found


def _share(own: dict[str, Any]) -> dict[str, Any]:
    """The share of a head that is rotated, which belongs to the family where nothing is asked for."""
    return {key: value for key, value in own.items() if key == rope.PARTIAL and value is not None}


def parameters_by_layer_type(architecture: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """rope_parameters of each layer type; empty if all layers share them, or if the family has none."""
    parameters = getattr(architecture, "rope_parameters", None) or {}
    return {name: dict(value) for name, value in parameters.items() if isinstance(value, dict)}
