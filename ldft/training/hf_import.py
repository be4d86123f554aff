"""Turns a Hugging Face config.json into ldft's model keys, by way of transformers' own config class.

The result is checked: the config that ldft builds from these keys equals the one that transformers reads from the file, in every
field that changes the model. A field that ldft cannot express is refused by name.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ldft.config import ModelConfig
from ldft.config.model import MOST_LAYERS
from ldft.errors import ConfigError, shown
from ldft.preflight import experts, families
from ldft.preflight.windows import SOFTCAPS, WINDOWED
from ldft.training import checkpoint_faults, verification
from ldft.training.architecture import REFUSED, hf_config, read_by_model, reads
from ldft.training.config_fields import MOVED, NO_EFFECT, ROPE, TIE, differing, plain_rope, relevant, renamed
from ldft.training.config_json import ConfigJson

# Fields of transformers' class -> ldft's keys. Rope, windows and heads have their own functions.
SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}


@dataclass(frozen=True, slots=True)
class Imported:
    """A model read from a config.json."""

    model: ModelConfig
    notes: list[str]
    """What the reader should know: parts left out, values that the file does not have."""
    unused: list[str]
    """Keys of the file that transformers does not read."""
    parameters: int
    """Number of parameters that transformers builds."""

    @property
    def said(self) -> list[str]:
        """The notes, and one on the unused keys."""
        unused = [f"transformers does not read these keys of the file: {', '.join(self.unused)}"] if self.unused else []
        return self.notes + unused


def convert(source: ConfigJson) -> Imported:
    """The model of a config.json. Raises ConfigError if ldft cannot build the same model, naming the key."""
    _check(source)
    with quiet():
        whole = _read(source)
        if whole.is_encoder_decoder:
            raise source.refusal(f"{whole.model_type} is an encoder-decoder; use a causal language model")
        return _convert(source, whole, whole.get_text_config())


def _convert(source: ConfigJson, whole: PretrainedConfig, text: PretrainedConfig) -> Imported:
    family = text.model_type
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise source.refusal(f"transformers has no causal language model for model_type={family}; use one that has")
    if getattr(text, "is_heterogeneous", False):
        raise source.refusal(
            f"the layers of {family} differ in shape (per_layer_config), which ldft cannot express; use another model"
        )
    if parts := [name for name in type(text).sub_configs if getattr(text, name, None) is not None]:
        raise source.refusal(f"{', '.join(parts)}: {family} cannot be had without this part; use a model of text alone")
    if not _declares(text, "rope_parameters") or not text.rope_parameters:
        encoder = ", is_decoder=false" if getattr(text, "is_decoder", True) is False else ""
        raise source.refusal(
            f"{family} has no rotary position embedding{encoder}; use a causal language model that has one"
        )
    _check_classes(source, whole.model_type)
    given, notes = source.values, []
    if text is not whole:
        # The section is found by what was read from it: its name differs between families.
        name = next(key for key in ("text_config", "decoder", "generator") if getattr(whole, key, None) is text)
        given = source.values.get(name) or {}
        notes.append(f"{whole.model_type} has more parts than text; only its text model, {family}, is used")
    notes += _check_sizes(source, text, given, nested=text is not whole)
    model = _keys(source, whole, text, given)
    undeclared, unused = _strays(text, given)
    try:
        _fill_extra(model, text, undeclared)
        model.validate()
        built = hf_config(model)
        network = verification.outline(built, model)
    except ConfigError as error:
        raise source.refusal(f"ldft cannot build it: {error}") from error
    _compare(source, model, text, built)
    return Imported(model, notes, unused, sum(parameter.numel() for parameter in network.parameters()))


def _check(source: ConfigJson) -> None:
    """Raise ConfigError for a file that transformers need not even be asked about."""
    values, family = source.values, source.values.get("model_type")
    if family is None:
        raise source.refusal(
            "it has no model_type, so it is no config of a transformers model; use a folder of save_pretrained"
        )
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(family), CONFIG_MAPPING, n=1)
        hint = f"did you mean {close[0]}?" if close else "a newer release may have it"
        if "auto_map" in values:
            hint = "its code is in the repository (auto_map), and ldft runs no code from there"
        raise source.refusal(f"transformers {transformers.__version__} has no model_type '{family}'; {hint}")
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    for key in ("quantization_config", "compression_config"):
        found = next((section[key] for section in sections if section.get(key)), None)
        if found is not None:
            method = found.get("quant_method", "") if isinstance(found, dict) else ""
            raise source.refusal(
                f"{key}{f' ({method})' if method else ''}: the weights are quantised, and ldft trains bf16, fp16 or fp32; "
                f"{checkpoint_faults.unquantised(method)}; for random weights, take the key out of a copy of the file"
            )
    for key, value in (item for section in sections for item in section.items()):
        if key.endswith(("layers", "n_layer")) and isinstance(value, int) and value > MOST_LAYERS:
            raise source.refusal(f"{key}={shown(value)} is too large; correct it, with at most {MOST_LAYERS} layers")
    for key, name in _classes(source):
        if not name.endswith(("ForCausalLM", "ForConditionalGeneration")):
            raise source.refusal(f"{key}={name} is not a causal language model; use one that is")


def _classes(source: ConfigJson) -> list[tuple[str, str]]:
    """(key, name) of the classes that the file says it is for."""
    code, names = source.values.get("auto_map"), source.values.get("architectures")
    found = [("architectures", name) for name in names] if isinstance(names, list) else []
    if isinstance(code, dict) and isinstance(written := code.get("AutoModelForCausalLM"), str):
        found.append(("auto_map", written.rpartition(".")[2]))
    return [(key, name) for key, name in found if isinstance(name, str) and "For" in name]


def _check_classes(source: ConfigJson, family: str) -> None:
    """Raise ConfigError if the file is for another class than those that transformers has for its model_type."""
    own = {kind[family] for key, kind in vars(modeling_auto).items() if key.endswith("_NAMES") and family in kind}
    known = {name.lower() for name in own if isinstance(name, str)}
    why = "correct one of them"
    if "auto_map" in source.values:
        why = "its code is in the repository (auto_map), and ldft runs no code from there"
    for key, name in _classes(source):
        if name.lower() not in known:
            raise source.refusal(f"{key}={name} is no class of transformers' for model_type={family}; {why}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own messages, which are no lines of ldft's."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _read(source: ConfigJson) -> PretrainedConfig:
    """The file as transformers reads it."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(renamed(source.values)))
        try:
            return AutoConfig.from_pretrained(file, trust_remote_code=False)
        except REFUSED as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise source.refusal(f"transformers refuses it ({reason[:300]}); correct that key") from error


def _declares(text: PretrainedConfig, key: str) -> bool:
    """Whether the class has this key. An object has every key of its file, also those that nothing reads."""
    return hasattr(type(text), key) or key in text.attribute_map


def _check_sizes(source: ConfigJson, text: PretrainedConfig, given: dict[str, Any], *, nested: bool) -> list[str]:
    """Raise ConfigError if a size is missing or no whole number. Returns notes.

    Files of save_pretrained have all sizes, except in a nested text_config: there, values equal to the class's are left out.
    """
    missing = [key for key in SIZES if key not in given and text.attribute_map.get(key) not in given]
    for key in SIZES:
        if not _declares(text, key):
            raise source.refusal(f"{text.model_type} has no {key}, which ldft needs; use another family")
        if type(value := getattr(text, key)) is not int or value < 1:
            raise source.refusal(
                f"{key}={shown(value)}: ldft needs one positive whole number here; correct it, or use another family"
            )
    if missing and not nested:
        raise source.refusal(f"it has no {', '.join(missing)}; fetch the whole file again, or add the key")
    if missing:
        return [f"{', '.join(missing)}: not in the file, so from transformers' {text.model_type}"]
    return []


def _keys(source: ConfigJson, whole: PretrainedConfig, text: PretrainedConfig, given: dict[str, Any]) -> ModelConfig:
    """ldft's keys, without extra."""
    heads = text.num_attention_heads
    model = ModelConfig(
        name=source.name,
        hf_id=source.where if source.key == "model.hf_id" else "",
        family=text.model_type,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=_head_dim(text),
        tie_word_embeddings=_tied(source, whole, text, given),
    )
    for key, name in SIZES.items():
        setattr(model, name, getattr(text, key))
    for key, name in SOFTCAPS.items():
        setattr(model, name, float(getattr(text, key, None) or 0))
    for name, value in experts.read(partial(hasattr, type(text)), partial(getattr, text)).items():
        setattr(model, name, value)
    model.sliding_window = text.sliding_window if _windowed(text) else 0
    model.rope_theta, model.rope_scaling = _rope(source, text)
    for key in ("num_key_value_heads", "head_dim", "sliding_window", "num_experts", "num_experts_per_token"):
        if type(value := getattr(model, key)) is not int:
            raise source.refusal(f"{key}={shown(value)}: ldft needs one whole number here; use another model")
    return model


def _head_dim(text: PretrainedConfig) -> Any:
    """Width of a head's queries. Where a part of each head is rotated apart from the rest, transformers' head_dim is that part."""
    parts = [getattr(text, key, None) for key in families.HEAD_PARTS]
    if all(type(part) is int for part in parts):
        return sum(parts)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _tied(source: ConfigJson, whole: PretrainedConfig, text: PretrainedConfig, given: dict[str, Any]) -> bool:
    """Whether the output projection is the embedding: as the file says, of the text model or of the whole; else as the text model
    that transformers makes of it."""
    if TIE in given or not hasattr(text, TIE):
        return bool(getattr(text if TIE in given and hasattr(text, TIE) else whole, TIE, False))
    return bool(getattr(whole if TIE in source.values else text, TIE))


def _windowed(text: PretrainedConfig) -> bool:
    """Whether some layer's attention has a window."""
    kinds = getattr(text, "layer_types", None)
    return bool(getattr(text, "sliding_window", None)) and (not kinds or WINDOWED in kinds)


def _rope(source: ConfigJson, text: PretrainedConfig) -> tuple[float, dict[str, Any]]:
    """model.rope_theta and model.rope_scaling: flat, or one dict for each layer type."""
    rope = plain_rope(text.rope_parameters)
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if nested:
        main = nested.get("full_attention") or next(iter(nested.values()))
        return _theta(source, main), nested
    theta = _theta(source, rope)
    del rope["rope_theta"]
    if rope.get("partial_rotary_factor") == 1:  # the whole head, which is the default
        del rope["partial_rotary_factor"]
    return theta, {} if rope == {"rope_type": "default"} else rope


def _theta(source: ConfigJson, rope: dict[str, Any]) -> float:
    theta = rope.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise source.refusal(
            f"rope_theta is {shown(theta)} in {shown(rope)}; write the base of the rotary embedding there"
        )
    return float(theta)


def _fill_extra(model: ModelConfig, text: PretrainedConfig, undeclared: dict[str, Any]) -> None:
    """Put what differs from the class's defaults into extra, but not lists that follow from other keys (such as layer_types)."""
    own = {
        *SIZES,
        *SOFTCAPS,
        *ROPE,
        "sliding_window",
        "use_sliding_window",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    }
    own |= experts.keys(model, partial(hasattr, type(text))).keys()
    default = type(text)()
    others = {
        key: getattr(text, key)
        for key in relevant(model, text)
        if key not in own and getattr(text, key) != getattr(default, key)
    }
    lists = {key: others.pop(key) for key in list(others) if isinstance(others[key], list)}
    model.extra = others | undeclared
    try:
        built = hf_config(model)
    except ConfigError:  # a list is needed for a valid config
        model.extra |= lists
    else:
        model.extra |= {key: value for key, value in lists.items() if getattr(built, key) != value}


def _compare(source: ConfigJson, model: ModelConfig, text: PretrainedConfig, built: PretrainedConfig) -> None:
    """Raise ConfigError if `built`, ldft's config of the model, is not the file's."""
    for key, (ours, theirs) in differing(built, text, relevant(model, text)).items():
        # The text part of some models has a tie of its own, which does not count. Where the file leaves the heads out, transformers
        # works them out as _keys does.
        if key in ("head_dim", "num_key_value_heads") or (key == TIE and ours == model.tie_word_embeddings):
            continue
        raise source.refusal(
            f"{key}={shown(theirs)}: ldft cannot build this {text.model_type}, it would have {shown(ours)}; use another model"
        )


def _strays(text: PretrainedConfig, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keys of the file that transformers' class does not declare: those that the model's code reads all the same, as
    getattr(config, "attention_head_dim", ...), and the names of those that nothing reads."""
    family, own = text.model_type, {"head_dim", "num_key_value_heads", *NO_EFFECT, *ROPE}
    # A trivial value cannot change anything, and token ids and names change no architecture.
    others = sorted(
        key
        for key, value in given.items()
        if key not in own and value and not _declares(text, key) and not re.search(r"^_|_token_(id|index)$", key)
    )
    # What only the class's constructor reads shows in the fields that it fills.
    used = {key: given[key] for key in others if read_by_model(family, key)}
    older = [
        key
        for key in ROPE - MOVED
        if given.get(key) is not None and not reads(family, key) and (text.rope_parameters or {}).get(key) != given[key]
    ]
    return used, sorted([*older, *(key for key in others if not reads(family, key))])
