"""Parameters by formula, size by size, against the models that transformers builds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from ldft.config import Config, ModelConfig
from ldft.preflight import decoder_layers, parameter_counts
from ldft.training.architecture import hf_config

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "training" / "published_configs.json").read_text())
# Different in each place, so that no two parameters of a layer have the same size by chance.
ODD = ModelConfig(num_layers=3, hidden_size=60, intermediate_size=100, num_attention_heads=6, num_key_value_heads=2,
                  head_dim=12, vocab_size=51)  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_token": 3}
MIXED = EXPERTS | {"expert_intermediate_size": 22}
MIXTURES = ("mixtral", "gpt_oss", "granitemoe", "qwen2_moe", "qwen3_moe")
DENSE = sorted(decoder_layers.FAMILIES.keys() - MIXTURES)
BIASED = [family for family in DENSE if "attention_bias" in decoder_layers.FAMILIES[family].biases]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"tie_word_embeddings": tied}) for family in DENSE for tied in (True, False)),
    *((family, {"extra": {"attention_bias": True}}) for family in BIASED),
    ("glm4", {"extra": {"attention_bias": False}}),
    *((family, {"extra": {"attention_bias": True, "mlp_bias": True}}) for family in ("llama", "granite", "smollm3")),
    *((family, EXPERTS) for family in ("mixtral", "gpt_oss", "granitemoe")),
    ("gpt_oss", EXPERTS | {"extra": {"attention_bias": False}}),
    *((family, MIXED) for family in ("qwen2_moe", "qwen3_moe")),
    *((family, MIXED | {"extra": {"mlp_only_layers": [1]}}) for family in ("qwen2_moe", "qwen3_moe")),
    ("qwen3_moe", MIXED | {"extra": {"decoder_sparse_step": 2, "attention_bias": True}, "tie_word_embeddings": True}),
    ("qwen3_moe", MIXED | {"extra": {"mlp_only_layers": [0, 1, 2]}}),
    ("qwen3_moe", MIXED | {"extra": {"decoder_sparse_step": 3}, "num_layers": 5}),
    ("qwen2_moe", MIXED | {"extra": {"shared_expert_intermediate_size": 35, "qkv_bias": False}}),
]  # fmt: skip


def sizes_of_transformers(config: PretrainedConfig) -> Counter[int]:
    with torch.device("meta"), no_init_weights():
        built = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    built.tie_weights()
    return Counter(parameter.numel() for parameter in built.parameters())


def odd(family: str, values: dict[str, Any]) -> ModelConfig:
    made = replace(ODD, family=family, **values)
    made.validate()
    return made


def test_every_family_is_tried() -> None:
    assert {family for family, _ in CASES} == set(decoder_layers.FAMILIES)


@pytest.mark.parametrize(
    ("family", "values"), CASES, ids=lambda part: part if isinstance(part, str) else json.dumps(part)
)
def test_every_parameters_size_is_transformers_own(family: str, values: dict[str, Any]) -> None:
    config = odd(family, values)
    assert parameter_counts.parameter_sizes(config) == sizes_of_transformers(hf_config(config))


def test_a_trained_parameter_has_a_master_weight_and_one_or_two_moments() -> None:
    config = Config()
    assert parameter_counts.state_bytes(config) == 4 + 2 * 4
    config.optimizer.name = "lion"
    assert parameter_counts.state_bytes(config) == 4 + 4


def test_the_largest_layer_is_the_one_with_most_parameters() -> None:
    half = {"extra": {"mlp_only_layers": [1]}}
    attention = 60 * 12 * (6 + 2 + 2 + 6) + 2 * 60 + 2 * 12
    dense, sparse = attention + 3 * 60 * 100, attention + 5 * 60 + 5 * 3 * 60 * 22
    assert parameter_counts.layer_parameters(odd("qwen3_moe", MIXED | half)) == sparse
    assert parameter_counts.layer_parameters(odd("qwen3_moe", MIXED | half | {"expert_intermediate_size": 2})) == dense
    assert parameter_counts.layer_parameters(odd("qwen3_moe", MIXED | half | {"intermediate_size": 500})) == (
        attention + 3 * 60 * 500
    )


def of_published(config: PretrainedConfig) -> ModelConfig:
    """The keys that decide about sizes, from transformers' own config."""

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), 0)

    keys = ("attention_bias", "mlp_bias", "mlp_only_layers", "decoder_sparse_step")
    return ModelConfig(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=first("head_dim") or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        num_experts=first("num_local_experts", "num_experts"),
        num_experts_per_token=first("num_experts_per_tok"),
        expert_intermediate_size=first("moe_intermediate_size"),
        tie_word_embeddings=config.tie_word_embeddings,
        extra={key: getattr(config, key) for key in keys if hasattr(config, key)},
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_to_the_last_parameter(name: str) -> None:
    raw = PUBLISHED[name]["config"]
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw))).get_text_config()
    found = of_published(config)
    assert found.family in decoder_layers.FAMILIES
    assert parameter_counts.num_parameters(found) == PUBLISHED[name]["parameters"]
    assert parameter_counts.parameter_sizes(found) == sizes_of_transformers(config)
