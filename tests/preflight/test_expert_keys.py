"""A mixture of experts is the one that the config says: its keys reach the family, and what a family does not read is refused."""

from __future__ import annotations

import functools
import inspect

import pytest
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ldft.config import AttentionKind, Config, Device, ModelConfig, Precision
from ldft.errors import ConfigError
from ldft.preflight import attention, experts, families
from ldft.training.architecture import hf_config

# Values that any mixture of experts accepts.
SMALL = {"intermediate_size": 48, "num_experts": 6, "num_experts_per_token": 2}


def of(family: str, **values: float) -> ModelConfig:
    made = ModelConfig(family=family)
    for key, value in (SMALL | values).items():
        setattr(made, key, value)
    return made


def refusal(family: str, **values: float) -> str:
    made = of(family, **values)
    with pytest.raises(ConfigError) as refused:
        made.validate()
        hf_config(made)
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("family", "number", "per_token", "width"),
    [
        ("mixtral", "num_local_experts", "num_experts_per_tok", "intermediate_size"),
        ("gpt_oss", "num_local_experts", "num_experts_per_tok", "intermediate_size"),
        ("granitemoe", "num_local_experts", "num_experts_per_tok", "intermediate_size"),
        ("phimoe", "num_local_experts", "num_experts_per_tok", "intermediate_size"),
        ("olmoe", "num_experts", "num_experts_per_tok", "intermediate_size"),
        ("qwen2_moe", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ("qwen3_moe", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ("glm4_moe", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ("deepseek_v3", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ("ernie4_5_moe", "moe_num_experts", "moe_k", "moe_intermediate_size"),
        ("hunyuan_v1_moe", "num_experts", "moe_topk", "intermediate_size"),
        ("gemma4_text", "num_experts", "top_k_experts", "moe_intermediate_size"),
    ],
)
def test_the_keys_reach_the_family_under_its_names(family: str, number: str, per_token: str, width: str) -> None:
    own = {"expert_intermediate_size": 40} if width != "intermediate_size" else {}
    found = experts.keys(of(family, **own), functools.partial(hasattr, CONFIG_MAPPING[family]))
    assert (found[number], found[per_token]) == (6, 2)
    assert found.get(width, 48) == (40 if own else 48)


def test_the_source_says_what_the_config_classes_say() -> None:
    """For every family whose source is read: the parent refuses what the ranks would."""
    read = 0
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        declared = families.config_keys(family)
        for values in (SMALL, SMALL | {"router_aux_loss": 0.1}, {"num_experts": 0, "num_experts_per_token": 0}):
            of_ranks: list[str] = []
            of_parent: list[str] = []
            for has, said in (
                (functools.partial(hasattr, CONFIG_MAPPING[family]), of_ranks),
                (declared.__contains__, of_parent),
            ):
                try:
                    said.append(str(experts.keys(of(family, **values), has)))
                except ConfigError as error:
                    said.append(str(error))
            assert "vocab_size" not in declared or of_ranks == of_parent, family
        read += "vocab_size" in declared
    assert read > 0.8 * len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_router_loss_is_accepted_where_the_loss_has_one() -> None:
    accepted = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        has = functools.partial(hasattr, CONFIG_MAPPING[family])
        try:
            found = experts.keys(of(family, router_aux_loss=0.1), has)
        except ConfigError:
            continue
        accepted.add(family)
        assert found["output_router_logits"] and 0.1 in found.values()
        forward = inspect.unwrap(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]].forward)
        assert "aux_loss" in forward.__code__.co_varnames, family
    assert {"mixtral", "qwen3_moe", "gpt_oss", "olmoe"} <= accepted and "llama4_text" not in accepted


def test_what_has_no_effect_or_is_impossible_is_refused_in_one_line() -> None:
    assert refusal("llama").startswith("model.num_experts: 6: transformers' llama reads no number of experts; use 0")
    for family, key in (("mixtral", "model.intermediate_size"), ("qwen3_moe", "model.expert_intermediate_size")):
        assert refusal(family, num_experts=0, num_experts_per_token=0) == (
            f"model.num_experts: 0, but transformers' {family} is a mixture of experts; set it and model.num_experts_per_token, "
            f"and {key} to the width of one expert"
        )
    assert refusal("mixtral", num_experts_per_token=7).startswith(
        "model.num_experts_per_token: 7 of model.num_experts=6 is not possible; use 1 to 6"
    )
    assert refusal("mixtral", num_experts_per_token=0).startswith("model.num_experts_per_token: 0 of")
    assert refusal("mixtral", num_experts=-1).startswith("model.num_experts: -1 is negative")
    assert refusal("qwen3_moe", expert_intermediate_size=-2).startswith(
        "model.expert_intermediate_size: -2 is negative"
    )
    assert refusal("mixtral", router_aux_loss=-0.5).startswith("model.router_aux_loss: -0.5 is negative")
    assert refusal("llama", num_experts=0).startswith("model.num_experts_per_token: 2 has no effect without experts")
    alone = {"num_experts": 0, "num_experts_per_token": 0}
    assert refusal("llama", **alone, router_aux_loss=0.1).startswith("model.router_aux_loss: 0.1 has no effect without")
    assert refusal("llama", **alone, expert_intermediate_size=9).startswith("model.expert_intermediate_size: 9 has no")
    assert "set that one, and this to 0" in refusal("mixtral", expert_intermediate_size=40)
    assert "transformers' glm4_moe has no such loss" in refusal("glm4_moe", router_aux_loss=0.1)
    assert "transformers' llama4_text has no such loss" in refusal("llama4_text", router_aux_loss=0.1)


def test_the_attention_of_gpt_oss_is_the_one_that_transformers_has() -> None:
    config = Config(model=of("gpt_oss", sliding_window=64))
    config.launch.device, config.train.precision = Device.cpu, Precision.bf16
    assert attention.choose(config) is AttentionKind.eager
    network = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["gpt_oss"]]
    assert not network._supports_sdpa and "flash_attention_2" not in str(network._compatible_flash_implementations)
