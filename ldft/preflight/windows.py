"""Attention windows and soft caps that would not arrive, found without importing transformers: from its source and a family's rule.

A family has one length of window. The layers that have it are those of `layer_types`, or, without such a list, those of the rule
below, which a test compares with transformers. The ranks see what every other family does, and refuse with the same lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.preflight import families
from ldft.terminal import plural

WINDOWED, WHOLE = "sliding_attention", "full_attention"
# transformers' names of ldft's keys that are 0 for none.
SOFTCAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"}
WINDOWS_AND_CAPS = {"sliding_window": "sliding_window", **SOFTCAPS}
_LAYERS_WITHOUT = 28  # max_window_layers of all families that have it


def _from_layer(extra: dict[str, Any], layer: int) -> bool:
    return layer >= int(extra.get("max_window_layers", _LAYERS_WITHOUT))


def _every_other_until(extra: dict[str, Any], layer: int) -> bool:
    return layer % 2 == 0 and layer < int(extra.get("max_window_layers", _LAYERS_WITHOUT))


def _without_rope(extra: dict[str, Any], layer: int) -> bool:
    rotated = extra.get("no_rope_layers")
    return not rotated[layer] if rotated else (layer + 1) % int(extra.get("no_rope_layer_interval", 4)) == 0


def _all_but_each(default: int, key: str = "") -> Callable[[dict[str, Any], int], bool]:
    return lambda extra, layer: (layer + 1) % int(extra.get(key, default)) != 0


def _but_the_first_of_four(_: dict[str, Any], layer: int) -> bool:
    return layer % 4 != 0


# Family -> whether a layer has a window, by model.extra and the layer's number.
_RULES: dict[str, Callable[[dict[str, Any], int], bool]] = {
    "afmoe": _all_but_each(4, "global_attn_every_n_layers"),
    "cohere2": _all_but_each(4, "sliding_window_pattern"),
    "exaone4": _all_but_each(4, "sliding_window_pattern"),
    "exaone_moe": _all_but_each(4, "sliding_window_pattern"),
    "gemma3n_text": _all_but_each(5),
    "granite_swa": _but_the_first_of_four,
    "granitemoe_swa": _but_the_first_of_four,
    "mimo_v2_flash": lambda _, layer: layer > 0 and (layer + 1) % 6 != 0,
    "vaultgemma": _all_but_each(2),
    "qwen2": _from_layer,
    "qwen3": _from_layer,
    "qwen2_moe": _every_other_until,
    "smollm3": _without_rope,
    "gemma2": _all_but_each(2),
    "gemma3_text": _all_but_each(6, "sliding_window_pattern"),
    "gpt_oss": _all_but_each(2),
    "olmo3": _all_but_each(4),
}


def check(model: ModelConfig) -> None:
    """Raise ConfigError for a window or soft cap that the ranks would refuse, as far as transformers' source says so."""
    declared = families.config_keys(model.family)
    for name, key in WINDOWS_AND_CAPS.items():
        if getattr(model, key) and not families.may_read(model.family, name):
            raise unsupported(model, key)
    check_switch(model, read="use_sliding_window" in declared)
    if "layer_types" not in declared:
        return
    kinds = _kinds(model, switched="use_sliding_window" in declared)
    if kinds is None:
        return
    if not model.sliding_window and WINDOWED in kinds:
        raise without_length(model, kinds)
    if model.sliding_window and WINDOWED not in kinds:
        raise reaches_no_layer(model, fix_of_layers("max_window_layers" in declared))


def number(model: ModelConfig) -> int:
    """Layers whose attention has a window; all, if the family's rule is not known here."""
    if not model.sliding_window:
        return 0
    declared = families.config_keys(model.family)
    kinds = _kinds(model, switched="use_sliding_window" in declared) if "layer_types" in declared else None
    return kinds.count(WINDOWED) if kinds else model.num_layers


def _kinds(model: ModelConfig, *, switched: bool) -> list[str] | None:
    """The type of each layer; None if it is not known here.

    switched: whether the family has windows only where model.sliding_window says so.
    """
    named = model.extra.get("layer_types")
    if named is not None:
        if not isinstance(named, list) or len(named) != model.num_layers:
            found = f"{len(named)} types" if isinstance(named, list) else "no list"
            raise ConfigError(
                "model.extra.layer_types",
                f"{found} for {plural(model.num_layers, 'layer')}; give a list with one for each layer",
            )
        return named
    rule = _RULES.get(model.family)
    if rule is None:
        return None
    windowed = bool(model.sliding_window) or not switched
    try:
        return [WINDOWED if windowed and rule(model.extra, layer) else "full" for layer in range(model.num_layers)]
    except (
        TypeError,
        ValueError,
        LookupError,
        ZeroDivisionError,
    ):  # transformers says what is wrong with the family's key
        return None


def check_switch(model: ModelConfig, *, read: bool) -> None:
    """Raise ConfigError if model.extra switches windows on or off against model.sliding_window. read: whether the family has this
    switch."""
    name, window = "use_sliding_window", model.sliding_window
    if read and name in model.extra and model.extra[name] is not (window > 0):
        raise ConfigError(
            f"model.extra.{name}", f"{model.extra[name]} contradicts model.sliding_window={window}; leave it out"
        )


def unsupported(model: ModelConfig, key: str) -> ConfigError:
    """The error for a window or soft cap that the family does not read."""
    return ConfigError(
        f"model.{key}", f"{getattr(model, key):g}: transformers' {model.family} does not support it; use 0"
    )


def without_length(model: ModelConfig, kinds: list[str]) -> ConfigError:
    """The error for layers that have a window where none is set: transformers fails in such a layer. kinds: one for each layer."""
    return ConfigError(
        "model.sliding_window",
        f"0, but transformers' {model.family} has a window in {kinds.count(WINDOWED)} of {plural(len(kinds), 'layer')}; "
        f"set its length, or model.extra.layer_types=[{','.join(['full_attention'] * min(len(kinds), 2))}"
        f"{',...' if len(kinds) > 2 else ''}] for none",
    )


def fix_of_layers(counted: bool) -> str:
    """What to do about a window that no layer has. counted: whether the family has a key for the number of layers without one."""
    if counted:
        return "the first layers have none; set model.extra.max_window_layers to their number, 0 for a window in all"
    return "use 0, or name the layers that have one in model.extra.layer_types"


def reaches_no_layer(model: ModelConfig, fix: str) -> ConfigError:
    """The error for a window that no layer has."""
    return ConfigError(
        "model.sliding_window",
        f"{model.sliding_window} reaches no layer of transformers' {model.family} with {plural(model.num_layers, 'layer')}: {fix}",
    )
