"""Finds models that transformers would refuse, without importing it: the import takes seconds, and the parent never imports it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ldft.config import ModelConfig
from ldft.errors import ConfigError

# Keys of families that rotate a part of each head apart from the rest: a head is as wide as both together.
HEAD_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")
# Families whose transformers config requires num_attention_heads to divide hidden_size even if head_dim is given.
WHOLE_HEADS = ("gemma2", "gemma3_text", "llama")


def _models() -> Path:
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "models")


@cache
def _declaration(family: str) -> str:
    """The source of the family's transformers config; empty if it is not found."""
    # The text part of a model with several kinds of input is declared in that model's file.
    folder = family.removesuffix("_text")
    file = _models() / folder / f"configuration_{folder}.py"
    source = file.read_text() if re.fullmatch(r"\w+", folder) and file.is_file() else ""
    classes = re.split(r"^(?=class )", source, flags=re.MULTILINE)
    return next((text for text in classes if f'    model_type = "{family}"\n' in text), "")


@cache
def config_keys(family: str) -> frozenset[str]:
    """Keys that the family's transformers config declares itself, read from its source; empty if they are not found there."""
    return frozenset(re.findall(r"^    (\w+): .*=", _declaration(family), re.MULTILINE))


def _check_head_parts(model: ModelConfig) -> None:
    """Raise ConfigError if model.head_dim is not what the family makes of the parts of a head."""
    defaults = dict(re.findall(r"^    (\w+): int = (\d+)$", _declaration(model.family), re.MULTILINE))
    parts = [model.extra.get(key, int(defaults.get(key, 0))) for key in HEAD_PARTS]
    if all(type(part) is int and part for part in parts) and (width := sum(parts)) != model.head_dim:
        raise ConfigError(
            "model.head_dim",
            f"{model.head_dim}, but transformers' {model.family} makes it of {' and '.join(HEAD_PARTS)} "
            f"({parts[0]} + {parts[1]}); use {width}",
        )


@cache
def may_read(family: str, key: str) -> bool:
    """Whether transformers' source of the family names a key of its config; true if the source is not found, or inherits keys from
    another family's."""
    folder = _models() / family.removesuffix("_text")
    if "vocab_size" not in config_keys(family):
        return True
    return any(re.search(rf"\b{re.escape(key)}\b", file.read_text()) for file in folder.glob("*.py"))


@cache
def causal() -> frozenset[str]:
    """Every `model_type` for which the installed transformers has a causal language model, read from its source; empty if its
    source has no such table."""
    file = _models() / "auto" / "modeling_auto.py"
    source = file.read_text() if file.is_file() else ""
    table = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = .*?^\)", source, re.DOTALL | re.MULTILINE)
    return frozenset(re.findall(r'\("([^"]+)", ', table[0] if table else ""))


@cache
def text_families(family: str) -> tuple[str, ...] | None:
    """The causal language models inside a family that also reads images or sound; None if the family is itself a text model.

    Read from transformers' source: such a family's config holds another one for the text, and ignores sizes beside it.
    """
    folder = _models() / family.replace("-", "_")
    source = "".join(file.read_text() for file in folder.glob("configuration_*.py"))
    for text in re.split(r"^(?=class )", source, flags=re.MULTILINE):
        if re.search(rf'^    model_type = "{re.escape(family)}"$', text, re.MULTILINE) and re.search(
            r'^    sub_configs\w*(?:: [^=]+)? = \{[^}]*"(?:text_config|decoder)"', text, re.MULTILINE
        ):
            inside = re.findall(r'^    model_type = "([^"]+)"$', source, re.MULTILINE)
            return tuple(name for name in inside if name != family and name in causal())
    return None


def check(model: ModelConfig, known: Collection[str]) -> None:
    """Raise ConfigError if transformers has no such text model. The ranks check a family's further keys.

    known: the existing families; empty: the ranks check the family too.
    """
    if known and model.family not in known:
        close = difflib.get_close_matches(model.family, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "use a model_type of transformers, e.g. llama"
        raise ConfigError("model.family", f"transformers has no causal language model '{model.family}'; {hint}")
    inside = text_families(model.family)
    if inside is not None:
        fix = f"use {' or '.join(inside)}" if inside else "use a text model"
        raise ConfigError(
            "model.family", f"{model.family} also reads images or sound, and ignores the sizes of a text model; {fix}"
        )
    _check_head_parts(model)
    heads = model.num_attention_heads
    if model.family in WHOLE_HEADS and model.hidden_size % heads:
        multiple = max(1, model.hidden_size // heads) * heads
        raise ConfigError(
            "model.hidden_size",
            f"{model.hidden_size} is not a multiple of model.num_attention_heads={heads}, as transformers' {model.family} "
            f"requires; use e.g. {multiple}",
        )
