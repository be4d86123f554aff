"""The fields of a transformers config that change the model, and in which of them two configs of one family differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from ldft.config import ModelConfig, rope
from ldft.preflight import experts

TIE = "tie_word_embeddings"
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers")
# Fields without effect on what is trained: labels of files, generation, outputs, tasks.
NO_EFFECT = {
    "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id", "model_type",
    "num_labels", "output_attentions", "output_hidden_states", "pretraining_tp", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache", "use_mrope", "_name_or_path", "cache_implementation",
}  # fmt: skip
# Older names of rope's values, which transformers moves into rope_parameters.
ROPE = {
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_pct",
    "rotary_emb_base",
}  # fmt: skip
# Those that it moves there for every family.
MOVED = {"rope_parameters", "rope_theta", "rope_scaling"}


def relevant(model: ModelConfig, text: PretrainedConfig) -> list[str]:
    """The fields of the class that change what is trained."""
    without = NO_EFFECT | (set() if model.sliding_window else set(_WINDOWS))
    if not model.router_aux_loss:
        without |= {*experts.AUX_LOSS, "output_router_logits"}
    return [field.name for field in fields(text) if field.name not in without and not field.name.endswith("_token_id")]


def differing(ours: PretrainedConfig, theirs: PretrainedConfig, keys: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Key -> (our value, theirs) of those keys that differ."""
    found = {}
    for key in keys:
        mine, other = getattr(ours, key, None), getattr(theirs, key, None)
        if key == "rope_parameters":
            mine, other = plain_rope(mine), plain_rope(other)
        if mine != other:
            found[key] = mine, other
    return found


def plain_rope(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Rope parameters without null values and without `type`, the older name of rope_type."""
    return {
        key: plain_rope(value) if isinstance(value, dict) else value
        for key, value in (parameters or {}).items()
        if value is not None and key != "type"
    }


def renamed(values: Any) -> Any:
    """The values with rope types under their present names: transformers knows an older one in some families alone."""
    if isinstance(values, list):
        return [renamed(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: rope.ALIASES.get(value, value)
        if key in ("type", "rope_type") and isinstance(value, str)
        else renamed(value)
        for key, value in values.items()
    }
