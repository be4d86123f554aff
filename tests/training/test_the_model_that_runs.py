"""The model that was asked for is the model that runs: a key that a family ignores is refused, whatever the family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from ldft.config import AttentionKind, Config, Device, ModelConfig, OffloadDevice, Precision, SeqLenConfig
from ldft.errors import ConfigError
from ldft.preflight import families
from ldft.preflight.selection import select
from ldft.training import flops, model, observation, verification
from ldft.training.architecture import hf_config, reads
from tests.conftest import compose

TOKENS = 100
EXPERTS = ("afmoe", "deepseek_v2", "exaone_moe", "gpt_oss", "granitemoe_swa", "llama4_text", "mimo_v2_flash", "olmoe", "qwen2_moe",
           "qwen3_moe", "qwen3_next")  # fmt: skip


def config_of(family: str, **values: Any) -> Config:
    sizes = {"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": 80, "intermediate_size": 96} | values
    if family in EXPERTS:
        sizes = {"num_experts": 4, "num_experts_per_token": 2} | sizes
    return Config(model=ModelConfig(family=family, **sizes), seq_len=SeqLenConfig(tokens=TOKENS))


def verified(config: Config, kind: AttentionKind = AttentionKind.sdpa) -> PreTrainedModel:
    config.model.validate()
    network = verification.outline(hf_config(config.model), config.model)
    verification.check(network, config, kind)
    return network


def windows(network: PreTrainedModel) -> list[int | None]:
    return [call.mask_window for call in observation.watch(network, TOKENS).attention]


GEMMA = {"sliding_window": 8, "attention_softcap": 50.0, "logit_softcap": 30.0, "rope_theta": 5e4}
LINEAR = {"type": "linear", "factor": 8.0}


def set_rope(**parameters: Any) -> Callable[[PretrainedConfig], None]:
    return lambda architecture: architecture.rope_parameters.update(parameters)


def set_key(key: str, value: Any) -> Callable[[PretrainedConfig], None]:
    return lambda architecture: setattr(architecture, key, value)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("model.num_layers", set_key("num_hidden_layers", 1)),
        ("model.vocab_size", set_key("vocab_size", 81)),
        ("model.hidden_size", set_key("hidden_size", 32)),
        ("model.intermediate_size", set_key("intermediate_size", 112)),
        ("model.num_attention_heads", set_key("num_attention_heads", 8)),
        ("model.num_key_value_heads", set_key("num_key_value_heads", 1)),
        ("model.tie_word_embeddings", set_key("tie_word_embeddings", True)),
        ("model.rope_scaling", set_rope(factor=2.0)),
        ("model.rope_scaling", set_rope(rope_type="default")),
        ("model.rope_scaling", set_rope(rope_theta=1e4)),
        ("model.sliding_window", set_key("sliding_window", 9)),
        ("model.sliding_window", set_key("layer_types", ["full_attention"] * 2)),
        ("model.attention_softcap", set_key("attn_logit_softcapping", None)),
        ("model.logit_softcap", set_key("final_logit_softcapping", 20.0)),
        ("model.logit_softcap", set_key("final_logit_softcapping", None)),
    ],
)
def test_another_model_is_caught(key: str, wrong: Callable[[PretrainedConfig], None]) -> None:
    config = config_of("gemma2", **GEMMA, rope_scaling=LINEAR)
    architecture = hf_config(config.model)
    wrong(architecture)
    with pytest.raises(ConfigError, match=f"^{key}: "):
        verification.check(verification.outline(architecture, config.model), config, AttentionKind.eager)


def test_another_number_of_experts_is_caught() -> None:
    config = config_of("qwen3_moe", num_experts=4, num_experts_per_token=2)
    architecture = hf_config(config.model)
    architecture.num_local_experts = 3
    with pytest.raises(ConfigError, match=r"^model.num_experts: 4 does not arrive: transformers' qwen3_moe has 3"):
        verification.check(verification.outline(architecture, config.model), config, AttentionKind.sdpa)


def test_a_width_of_heads_that_does_not_arrive_is_caught() -> None:
    config = config_of("llama", head_dim=32)
    architecture = hf_config(config.model)
    architecture.head_dim = 16
    with pytest.raises(ConfigError, match=r"^model.head_dim: 32 does not arrive: transformers' llama has 16"):
        verification.check(verification.outline(architecture, config.model), config, AttentionKind.sdpa)


def test_code_that_ignores_its_config_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    longrope = {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
    scaled = config_of("llama", rope_scaling=longrope | {"original_max_position_embeddings": 2 * TOKENS})
    gemma = config_of("gemma2", **GEMMA)
    verified(scaled)
    verified(gemma, AttentionKind.eager)

    def without_scale(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    class NeverScaled(modeling_llama.LlamaRotaryEmbedding):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.inv_freq = nn.Buffer(self.compute_default_rope_parameters(config)[0], persistent=False)
            self.rope_type = "default"

    for target, name, broken, config, key in (
        (modeling_llama.LlamaRotaryEmbedding, "forward", without_scale, scaled, "model.rope_scaling"),
        (modeling_llama, "LlamaRotaryEmbedding", NeverScaled, scaled, "model.rope_scaling"),
        (
            modeling_gemma2,
            "create_sliding_window_causal_mask",
            modeling_gemma2.create_causal_mask,
            gemma,
            "model.sliding",
        ),
    ):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"^{key}"):
            patch.setattr(target, name, broken)
            verified(config, AttentionKind.eager)


@pytest.mark.parametrize(
    ("family", "values", "expected"),
    [
        ("qwen3", {"extra": {"max_window_layers": 1}}, [None, 8]),
        ("qwen2", {"extra": {"max_window_layers": 0, "use_sliding_window": True}}, [8, 8]),
        ("qwen3", {"extra": {"layer_types": ["sliding_attention", "full_attention"]}}, [8, None]),
        ("qwen3_moe", {}, [8, 8]),
        ("mistral", {}, [8, 8]),
        ("mistral", {"sliding_window": 0}, [None, None]),
        ("qwen2", {"sliding_window": 0, "extra": {"use_sliding_window": False, "max_window_layers": 28}}, [None, None]),
        ("gemma2", {"sliding_window": 0, "extra": {"layer_types": ["full_attention"] * 2}}, [None, None]),
        ("gpt_oss", {}, [8, None]),
    ],
)
def test_windows_reach_the_layers_that_have_one(
    family: str, values: dict[str, Any], expected: list[int | None]
) -> None:
    network = verified(config_of(family, **({"sliding_window": 8} | values)))
    assert windows(network) == expected
    assert flops._windowed_layers(network) == sum(window is not None for window in expected)


@pytest.mark.parametrize(
    ("family", "values", "says"),
    [
        ("qwen3", {"sliding_window": 8}, r"sliding_window: 8 reaches no layer .* model.extra.max_window_layers"),
        ("qwen2", {"sliding_window": 8}, r"sliding_window: 8 reaches no layer .* model.extra.max_window_layers"),
        ("qwen3", {"extra": {"use_sliding_window": True}}, r"extra.use_sliding_window: True contradicts model.sliding_window=0"),
        (
            "qwen2",
            {"sliding_window": 8, "extra": {"use_sliding_window": False}},
            r"extra.use_sliding_window: False contradicts model.sliding_window=8",
        ),
        ("gemma2", {}, r"sliding_window: 0, but transformers' gemma2 has a window in 1 of 2 layers; .* model.extra.layer_types="),
        (
            "inkling_text",  # its own name for them is another
            {"sliding_window": 8, "num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 16,
             "extra": {"layer_types": ["full_attention", "sliding_attention"]}},
            r"extra.layer_types: full_attention of layer 0 does not arrive: that layer should have no window, but .* gives it one",
        ),
        ("olmoe", {"sliding_window": 8}, r"sliding_window: 8 reaches no layer .* attention.kind=flash_attention_2"),
        ("llama", {"sliding_window": 8}, r"sliding_window: 8: transformers' llama does not support it"),
        ("gemma3_text", {"sliding_window": 8, "attention_softcap": 5.0}, r"attention_softcap: 5 does not arrive"),
        ("llama", {"attention_softcap": 5.0}, r"attention_softcap: 5: transformers' llama does not support it"),
        ("gpt_neox", {}, r"num_key_value_heads: 2 does not arrive: transformers' gpt_neox has 4"),
        ("bart", {}, r"num_layers: 2 does not arrive: transformers' bart has"),
        ("bloom", {"rope_theta": 5e5}, r"rope_theta: 500000: ldft sees no rotary embedding in transformers' bloom"),
        ("xlstm", {"tie_word_embeddings": True}, r"tie_word_embeddings: True does not arrive"),
        ("ministral3", {}, r"family: .*cannot run with these values \(TypeError: "),
        ("plbart", {}, r": transformers cannot build this plbart"),
        ("llama", {"extra": {"rms_norm_epz": 1.0}}, r"extra.rms_norm_epz: .* did you mean rms_norm_eps\?"),
        ("llama", {"extra": {"validate_rope": 1.0}}, r"extra.validate_rope: .* has no such key"),
        ("llama", {"extra": {"attention_bias": 3}}, r": transformers refuses this llama: .*attention_bias"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_arrive_is_one_line(family: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.?{says}") as error:
        verified(config_of(family, **values), AttentionKind.eager)
    assert "\n" not in str(error.value)


def test_families_with_several_kinds_of_input_are_refused_before_transformers_is_imported() -> None:
    for family, inside in (
        ("gemma3", "gemma3_text"),
        ("gemma4", "gemma4_text"),
        ("llama4", "llama4_text"),
        ("mllama", "text"),
    ):
        with pytest.raises(ConfigError, match=rf"^model.family: {family} also reads .* use .*{inside}"):
            families.check(ModelConfig(family=family), families.causal())
    for family in ("llama", "gemma3_text", "gpt_oss", "qwen3_moe", "bert-generation"):
        assert families.text_families(family) is None
    composite = {family for family in families.causal() if families.text_families(family) is not None}
    assert {"gemma3", "gemma3n", "llama4", "fuyu", "emu3"} <= composite and len(composite) < 30


def test_a_family_reads_what_its_code_names() -> None:
    # Not declared by the config's class: read by the model, or taken from what the config was given.
    assert reads("qwen3_moe", "head_dim") and reads("gemma3_text", "sliding_window_pattern")
    assert reads("gemma3_text", "rope_local_base_freq") and reads("mistral", "sliding_window")
    assert not reads("llama", "sliding_window") and not reads("llama", "rope_local_base_freq")
    assert not reads("llama", "validate_rope") and not reads("qwen3_moe", "max_window_layers")
    config = config_of("gemma3_text", num_layers=2, sliding_window=8, extra={"sliding_window_pattern": 2})
    assert windows(verified(config)) == [8, None]


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "qwen3_next", "llama4_text", "phi", "stablelm", "falcon"])
def test_families_that_need_more_than_plain_attention_still_run(family: str) -> None:
    verified(config_of(family, rope_theta=5e4))


def test_an_option_at_full_size_is_verified_and_a_wrong_one_is_not_built() -> None:
    verified(compose("model=llama3_70b"))
    config = config_of("qwen3", sliding_window=8)
    config.launch.device, config.train.precision, config.offload.stage = Device.cpu, Precision.fp32, 0
    config.offload.parameters = config.offload.optimizer = OffloadDevice.none
    with pytest.raises(ConfigError, match=r"model.sliding_window: 8 reaches no layer"):
        model.build(select(config), torch.device("cpu"))
    config.model.family, config.model.sliding_window, config.model.rope_scaling = "gemma3_text", 8, LINEAR
    config.model.num_layers, config.model.rope_theta = 6, 1e6
    rotary = model.build(select(config), torch.device("cpu")).model.rotary_emb
    pairs = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    torch.testing.assert_close(rotary.full_attention_inv_freq.double(), 1e6**-pairs / 8, rtol=1e-5, atol=0)
    torch.testing.assert_close(rotary.sliding_attention_inv_freq.double(), 1e4**-pairs, rtol=1e-5, atol=0)
