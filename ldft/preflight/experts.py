"""Mixture of experts: the names under which a family reads the experts' keys. Imports no torch.

Families of transformers agree on what they read, but not on its name. Each tuple holds the names of one value; a family's config
class has one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ldft.config import Config, ModelConfig
from ldft.errors import ConfigError
from ldft.preflight import families

_NUMBER = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
# Families without such a name have experts as wide as model.intermediate_size says.
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
AUX_LOSS = ("router_aux_loss_coef", "aux_loss_coef")
# A switch in the families that also have dense models.
_SWITCH = ("enable_moe_block", "is_moe")
# Families whose experts have no switch, but which are dense with 0 of them.
_DENSE_WITHOUT = ("granitemoehybrid",)
# Families that have a coefficient, which their loss leaves out.
_NO_LOSS = ("llama4_text",)


def read(has: Callable[[str], bool], value: Callable[[str], Any]) -> dict[str, Any]:
    """The experts' keys of ldft from a family's transformers config, the reverse of keys(); empty for a dense model.

    has: whether the family's config class has a key of this name; value: its value.
    """
    number, per_token = (next(filter(has, names), None) for names in (_NUMBER, _PER_TOKEN))
    switch, width, coefficient = (next(filter(has, names), None) for names in (_SWITCH, _WIDTH, AUX_LOSS))
    if number is None or per_token is None or not value(number) or (switch and not value(switch)):
        return {}
    found = {"num_experts": value(number), "num_experts_per_token": value(per_token) or 0}
    if width:
        found["expert_intermediate_size"] = value(width) or 0
    if coefficient and has("output_router_logits") and value("output_router_logits"):
        found["router_aux_loss"] = float(value(coefficient))
    return found


def keys(model: ModelConfig, has: Callable[[str], bool]) -> dict[str, Any]:
    """The experts' keys of the family's transformers config; empty for a dense family.

    has: whether the family's config class has a key of this name. Raises ConfigError if the family does not read what is set.
    """

    def name_of(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if has(name)), None)

    family, number, per_token, switch = model.family, name_of(_NUMBER), name_of(_PER_TOKEN), name_of(_SWITCH)
    if number is None or per_token is None:
        if model.num_experts:
            raise ConfigError(
                "model.num_experts",
                f"{model.num_experts}: transformers' {family} reads no number of experts; use 0, or a family that does, e.g. "
                "mixtral or qwen3_moe",
            )
        return {}
    if not model.num_experts:
        if switch:
            return {switch: False}
        if family in _DENSE_WITHOUT:
            return {number: 0}
        raise ConfigError(
            "model.num_experts",
            f"0, but transformers' {family} is a mixture of experts; set it and model.num_experts_per_token, and "
            f"model.{'expert_' if name_of(_WIDTH) else ''}intermediate_size to the width of one expert",
        )
    found: dict[str, Any] = {number: model.num_experts, per_token: model.num_experts_per_token}
    if switch:
        found[switch] = True
    if width := name_of(_WIDTH):
        found[width] = expert_width(model)
    elif expert_width(model) != model.intermediate_size:
        raise ConfigError(
            "model.expert_intermediate_size",
            f"{model.expert_intermediate_size}: transformers' {family} reads the width of its experts from "
            "model.intermediate_size; set that one, and this to 0",
        )
    coefficient = name_of(AUX_LOSS)
    lossless = family in _NO_LOSS or coefficient is None or not has("output_router_logits")
    if model.router_aux_loss and lossless:
        raise ConfigError(
            "model.router_aux_loss", f"{model.router_aux_loss:g}: transformers' {family} has no such loss; use 0"
        )
    if coefficient:
        found[coefficient] = model.router_aux_loss
    if has("output_router_logits"):
        found["output_router_logits"] = model.router_aux_loss > 0
    return found


def expert_width(model: ModelConfig) -> int:
    """Width of one routed expert's MLP, elements."""
    return model.expert_intermediate_size or model.intermediate_size


def check(model: ModelConfig) -> None:
    """keys() without importing transformers, from its source. Families whose source does not say are left to the ranks."""
    declared = families.config_keys(model.family)
    if "vocab_size" in declared:
        keys(model, declared.__contains__)


def notes(config: Config) -> list[str]:
    """A note that adapters leave the experts as they are."""
    if not config.model.num_experts or not config.lora.rank:
        return []
    return ["lora: the weights of experts have no adapters and are not trained"]
