"""The config.json beside pretrained weights, compared with the model that they are to be loaded into.

Names and shapes of tensors do not tell all models apart: a rotary embedding, an epsilon, an activation or a soft cap has neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldft.config import Config, rope
from ldft.errors import ConfigError, shown
from ldft.preflight.windows import WINDOWS_AND_CAPS
from ldft.training import config_json

# Parts of these names belong to training, not to the model that the weights are of.
_TRAINING = ("dropout", "pdrop", "jitter_noise", "aux_loss_coef", "output_router_logits")


def check(config: Config, folder: Path, *, given: bool) -> list[str]:
    """Notes on keys of the model that differ from the file's. Raises ConfigError if they make another model of the weights.

    given: whether the model is of such a file, so that what differs was written beside it on purpose; it is noted alone.
    """
    model = config.model
    if not (folder / config_json.NAME).is_file():
        return [f"model.path: no {config_json.NAME} in {folder}, so only names and shapes of its tensors were compared"]
    from ldft.training import hf_import  # takes seconds, which loading weights takes as well
    from ldft.training.architecture import hf_config
    from ldft.training.config_fields import differing, relevant

    source = config_json.read(str(folder), "")
    found = hf_import.convert(source).model
    if found.family != model.family:
        raise ConfigError("model.family", f"{model.family}, but {source.where} is of {found.family}; use model=from_hf")
    # Fewer layers are the first ones, on purpose.
    found.extra = config_json.shortened(found.extra, found.num_layers, model.num_layers)
    found.num_layers = model.num_layers
    ours, theirs = hf_config(model), hf_config(found)
    fields = dict.fromkeys([*relevant(model, ours), *relevant(found, theirs)])
    fields.pop("initializer_range", None)  # nothing is drawn
    changed = differing(ours, theirs, fields)
    found_keys = [(name, *one) for name, values in changed.items() for one in _named(name, *values)]
    by_length = any(kind in str(ours.rope_parameters) for kind in rope.BY_LENGTH)
    refused = [one for one in found_keys if not (given or _of_training(one[0], by_length=by_length))]
    if refused:
        _, key, one, two = refused[0]
        others = "".join(f", {other} {shown(mine)} and {shown(its)}" for _, other, mine, its in refused[1:])
        use = "" if isinstance(two, dict | list) else f"{key}={'null' if two is None else two}, or "
        raise ConfigError(
            key,
            f"{shown(one)}, but {source.where} has {shown(two)}{f' (likewise{others[1:]})' if others else ''}: not the model of "
            f"these weights; use {use}model=from_hf, beside which a value of your own is kept",
        )
    return [f"{key}: {shown(one)}, while {source.where} has {shown(two)}" for _, key, one, two in found_keys]


def _of_training(name: str, *, by_length: bool) -> bool:
    """Whether a field of transformers' belongs to training. by_length: whether the rotary embedding depends on the length."""
    return any(part in name for part in _TRAINING) or (name == "max_position_embeddings" and not by_length)


def _named(name: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """(ldft's key, our value, the file's) of a field that differs."""
    from ldft.training.hf_import import SIZES

    if name == "rope_parameters":
        bases = [parameters.get("rope_theta") for parameters in (ours, theirs)]
        rests = [{key: one for key, one in values.items() if key != "rope_theta"} for values in (ours, theirs)]
        found = [("model.rope_theta", *bases), ("model.rope_scaling", *rests)]
        return [(key, one, two) for key, one, two in found if one != two]
    keys = SIZES | WINDOWS_AND_CAPS | {key: key for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings")}
    return [(f"model.{keys[name]}" if name in keys else f"model.extra.{name}", ours, theirs)]
