"""Rotary position embedding: the types, the parameters of each, and one form for the ways in which they are written.

Torch-free, so that the parent refuses what transformers would ignore: it only warns of unknown types and parameters.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldft.errors import ConfigError
from ldft.terminal import plural

ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
FINETUNED = "finetuned"
"""In files of models that were trained with YaRN: a label, which no formula reads."""


@dataclass(frozen=True, slots=True)
class _Type:
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


# The types with a formula that transformers documents (modeling_rope_utils.py), and the parameters that each formula reads.
TYPES = {
    "default": _Type(),
    "linear": _Type(required=("factor",)),
    "dynamic": _Type(required=("factor",)),
    "yarn": _Type(
        required=("factor",),
        optional=(
            ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            FINETUNED,
        ),
    ),
    "longrope": _Type(required=("short_factor", "long_factor", ORIGINAL), optional=("factor", "attention_factor")),
    "llama3": _Type(required=("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)),
    "proportional": _Type(optional=("factor",)),
}
BY_LENGTH = ("dynamic", "longrope")
"""Types whose angles depend on the length of the sequence."""
# Parameters that one family's code reads for a type, or that its published files have beside those.
_HUNYUAN = ("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_OF_FAMILY = {
    ("phimoe", "longrope"): ("short_mscale", "long_mscale"),
    ("hunyuan_v1_dense", "dynamic"): _HUNYUAN,
    ("hunyuan_v1_moe", "dynamic"): _HUNYUAN,
}
# Names in older files.
ALIASES = {"su": "longrope"}
_MULTIMODAL = ("mrope", "mrope_section", "mrope_interleaved")
# Parameters that every type reads.
_COMMON = ("rope_type", "rope_theta", PARTIAL)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _positives(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_positive(item) for item in value)


# Parameter -> (whether a value is possible, what is).
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "factor": (lambda value: _number(value) and value >= 1, "a number of 1 or more"),
    ORIGINAL: (lambda value: _number(value) and isinstance(value, int) and value >= 2, "a whole number of tokens"),
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
    FINETUNED: (lambda value: isinstance(value, bool), "true or false"),
    "short_factor": (_positives, "a list of positive numbers"),
    "long_factor": (_positives, "a list of positive numbers"),
    "mscale": (lambda value: _number(value) and value >= 0, "a number of 0 or more"),
    "mscale_all_dim": (lambda value: _number(value) and value >= 0, "a number of 0 or more"),
    PARTIAL: (lambda value: _positive(value) and value <= 1, "a number above 0, at most 1"),
} | {
    name: (_positive, "a positive number")
    for name in (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "low_freq_factor",
        "high_freq_factor",
        "rope_theta",
        "alpha",
        "short_mscale",
        "long_mscale",
    )
}


def normalised(
    scaling: Mapping[str, Any], *, theta: float, head_dim: int, original: int | None = None, family: str = ""
) -> dict[str, dict[str, Any]]:
    """Layer type -> parameters, with rope_type always and `type` never among them. One entry "" if all layers share them.

    theta: base, where the parameters name none. head_dim: elements of a head that can be rotated. original: published length,
    tokens, where the parameters name none. family: model.family, since some families read further parameters. Raises ConfigError if
    a parameter is unknown, missing, or out of range.
    """
    nested = [name for name, value in scaling.items() if isinstance(value, Mapping)]
    if not nested:
        found = _checked(scaling, "model.rope_scaling", head_dim, original, family)
        if found.setdefault("rope_theta", theta) != theta:
            raise ConfigError(
                "model.rope_scaling.rope_theta",
                f"{found['rope_theta']:g} contradicts model.rope_theta={theta:g}; set only that one",
            )
        return {"": found}
    for name, value in scaling.items():
        if name not in nested:
            raise ConfigError(
                f"model.rope_scaling.{name}",
                f"{value} stands beside parameters by layer type; move it into {' or '.join(nested)}",
            )
    return {name: _checked(scaling[name], f"model.rope_scaling.{name}", head_dim, original, family) for name in nested}


def _checked(given: Mapping[str, Any], at: str, head_dim: int, original: int | None, family: str) -> dict[str, Any]:
    """The parameters of one layer type, of which `type` and null are resolved."""
    values = {str(name): value for name, value in given.items() if value is not None}
    kind = _kind(values, at)
    values = {"rope_type": kind} | {name: value for name, value in values.items() if name not in ("rope_type", "type")}
    required, optional = TYPES[kind].required, TYPES[kind].optional
    if original is not None and ORIGINAL in required + optional and values.setdefault(ORIGINAL, original) != original:
        raise ConfigError(
            f"{at}.original_max_position_embeddings",
            f"{values[ORIGINAL]} contradicts model.extra.original_max_position_embeddings={original}; leave one out",
        )
    allowed = (*_COMMON, *required, *optional, *_OF_FAMILY.get((family, kind), ()))
    for name, value in values.items():
        if name not in allowed and any(name in one.required + one.optional for one in TYPES.values()):
            whole = _override({name: values.get(name, "...") for name in allowed if name in (*required, *values)}, at)
            raise ConfigError(
                f"{at}.{name}",
                f"{value} has no effect with rope_type={kind}; leave it out, or give the parameters of {kind} together, which "
                f"replaces those of another type: {whole}",
            )
        if name not in allowed:
            raise ConfigError(f"{at}.{name}", _unknown(name, value, kind, allowed))
        possible, what = _RANGES.get(name, (lambda value: True, ""))
        if not possible(value):
            raise ConfigError(f"{at}.{name}", f"{value!r} is not possible; use {what}")
    for name in required:
        if name not in values:
            raise ConfigError(f"{at}.{name}", f"missing; rope_type={kind} needs {', '.join(required)}")
    check_together(values, at, head_dim)
    return values


def _kind(values: Mapping[str, Any], at: str) -> str:
    """The type, from `rope_type` or its older name `type`."""
    names = {key: values[key] for key in ("rope_type", "type") if key in values}
    for key, name in names.items():
        if name in _MULTIMODAL:
            raise ConfigError(
                f"{at}.{key}", f"'{name}' is for images and video, which ldft does not train; use a text model's"
            )
        if ALIASES.get(str(name), str(name)) not in TYPES:
            raise ConfigError(f"{at}.{key}", f"'{name}' does not exist; use one of {', '.join(TYPES)}")
    kinds = {ALIASES.get(name, name) for name in names.values()}
    if len(kinds) > 1:
        raise ConfigError(
            f"{at}.type", f"'{values['type']}' contradicts rope_type={values['rope_type']}; set rope_type alone"
        )
    others = [name for name in values if name not in _COMMON]
    if not kinds and others:
        raise ConfigError(
            f"{at}.rope_type", f"missing, so {others[0]} would have no effect; use one of {', '.join(TYPES)}"
        )
    return kinds.pop() if kinds else "default"


def _override(values: Mapping[str, Any], at: str) -> str:
    """The parameters of one layer type as typed on the command line."""
    text = ", ".join(f"{name}: {'...' if isinstance(value, list) else value}" for name, value in values.items())
    layer = at.removeprefix("model.rope_scaling").removeprefix(".")
    return f"'model.rope_scaling={{{f'{layer}: {{{text}}}' if layer else text}}}'"


def _unknown(name: str, value: Any, kind: str, allowed: tuple[str, ...]) -> str:
    if name in _MULTIMODAL:
        return f"{value} is for images and video, which ldft does not train; leave it out"
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"rope_type={kind} has no such parameter; " + (
        f"did you mean {close[0]}?" if close else f"use {', '.join(allowed)}"
    )


def check_together(values: Mapping[str, Any], at: str, head_dim: int) -> None:
    """Conditions on several parameters of one layer type. Raises ConfigError where its formula would fail or turn around.

    at: dotted key of the parameters, for the message. head_dim: elements of a head that can be rotated.
    """
    kind, rotated = values["rope_type"], int(head_dim * values.get(PARTIAL, 1.0))
    if rotated < 2 or rotated % 2:
        raise ConfigError(
            f"{at}.partial_rotary_factor",
            f"{values.get(PARTIAL, 1.0)} rotates {rotated} of {head_dim} elements; use a share that rotates pairs",
        )
    if kind == "dynamic" and rotated == 2:
        raise ConfigError(f"{at}.rope_type", "dynamic needs more than one rotated pair; use a wider model.head_dim")
    if kind == "llama3" and values["high_freq_factor"] < values["low_freq_factor"]:
        raise ConfigError(
            f"{at}.high_freq_factor",
            f"{values['high_freq_factor']} is not above low_freq_factor={values['low_freq_factor']}; use a higher one",
        )
    fast, slow = values.get("beta_fast", 32), values.get("beta_slow", 1)
    if kind == "yarn" and fast < slow:
        raise ConfigError(f"{at}.beta_fast", f"{fast} is below beta_slow={slow}; use a higher one")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        if len(values[name]) != rotated // 2:
            raise ConfigError(
                f"{at}.{name}",
                f"{plural(len(values[name]), 'number')}; use {rotated // 2}, one for each pair of rotated elements",
            )
