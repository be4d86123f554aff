"""Names in a checkpoint that the model does not have, or lacks: what they say about how it was saved."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import PreTrainedModel

from ldft.config import ModelConfig
from ldft.errors import ConfigError
from ldft.training.safetensors_index import Entry
from ldft.training.weight_conversion import Plan

# Buffers that models compute, but old releases saved.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.(attn|attention|self_attn)\.masked_bias$")
_MASK = re.compile(r"\.(attn|attention|self_attn)\.bias$")
_OLD_NORMS = {"weight": "gamma", "bias": "beta"}


def explained(missing: str, plan: Plan, config: ModelConfig) -> str:
    """What to do about a tensor that the files lack, from the names that they have instead; empty if these say nothing."""
    have = {*plan.unexpected.values(), *(name for group in plan.groups for name, _ in group.sources)}
    for name in sorted(have, key=len):
        if name.endswith(f".{missing}"):
            prefix = name.removesuffix(missing)
            return f"its names begin with '{prefix}': the model was saved inside another; save the inner one, or rename them"
    for new, old in _OLD_NORMS.items():
        if (stem := missing.removesuffix(f".{new}")) != missing and any(
            name.endswith(f"{stem}.{old}") for name in have
        ):
            return f"it has {stem}.{old}, an old name; rename gamma to weight and beta to bias"
    if missing == "lm_head.weight" and plan.groups:
        return (
            "use model.tie_word_embeddings=true if it was published with a tied output, else save the model with its lm_head, "
            "not the base model alone"
        )
    if not plan.groups and have:
        return f"it has no tensor of {config.family}, but {min(have)}; save the model with save_pretrained"
    return ""


def ignored(model: PreTrainedModel, plan: Plan, entries: dict[str, Entry], path: Path, config: ModelConfig) -> str:
    """A sentence that names tensors of the files which are not loaded; empty if there are none but those that transformers
    ignores too.

    Raises ConfigError if they lie inside a module or a layer of the model, which would then compute something else than what was
    saved. Layers beyond model.num_layers are left out on purpose.
    """
    expected = set(model.state_dict())
    computed = {name for name, _ in model.named_buffers()}
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    modules = {name.rpartition(".")[0] for name in expected}
    lengths = _lengths(expected)
    others = []
    for target, name in plan.unexpected.items():
        if target in computed or _COMPUTED.search(name) or any(pattern.search(target) for pattern in patterns):
            continue
        if _MASK.search(name) and len(entries[name].shape) == 4:  # the causal mask of old releases, not a bias
            continue
        # The base model's prefix may be missing, or doubled.
        prefix = f"{model.base_model_prefix}."
        candidates = (target, prefix + target, target.removeprefix(prefix))
        stack, number = max((_place(candidate, lengths) for candidate in candidates), key=lambda place: place[1])
        if number >= config.num_layers == lengths.get(stack):
            continue
        if number >= 0 or any(candidate.rpartition(".")[0] in modules for candidate in candidates):
            raise ConfigError(
                "model.path",
                f"{path} has {name}, which {config.name} lacks: it would compute something else; choose the model= that {path} was "
                "saved from",
            )
        others.append(name)
    if not others:
        return ""
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{path}: tensors that {config.name} does not have are ignored: {', '.join(sorted(others)[:3])}{more}"


def _lengths(names: set[str]) -> dict[str, int]:
    """Stack of layers -> its length, from names like model.layers.3.mlp.up_proj.weight."""
    found: dict[str, int] = {}
    for name in names:
        stack, number = _place(name)
        if number >= 0:
            found[stack] = max(found.get(stack, 0), number + 1)
    return found


def _place(name: str, known: dict[str, int] | None = None) -> tuple[str, int]:
    """The stack that a tensor lies in and its number there; -1 if it lies in none, or in one that is not known."""
    found = re.search(r"^(.*?)\.(\d+)\.", name)
    if found is None or (known is not None and found[1] not in known):
        return "", -1
    return found[1], int(found[2])
