"""Every type of rotary embedding in every family: rotated by the angles of the formula, or refused; never ignored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldft.config import AttentionKind, Config, ModelConfig, SeqLenConfig
from ldft.errors import ConfigError
from ldft.training import observation, verification
from ldft.training.architecture import hf_config

DIM, LONGEST, THETA = 16, 128, 50000.0
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, whole": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32, "beta_fast": 8, "beta_slow": 2,
        "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False,
    },
    "longrope": {
        "type": "su", "short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "half": {"partial_rotary_factor": 0.5},
    "half, linear": {"partial_rotary_factor": 0.5, "type": "linear", "factor": 8.0},
}  # fmt: skip
PARTIAL = {"half", "half, linear"}
# Family -> scalings that it does not have. Read in transformers 5.17 and 5.23.
REFUSED = {
    "llama": PARTIAL,
    "qwen2": PARTIAL,
    "qwen3": PARTIAL,
    "qwen3_moe": PARTIAL,
    "mistral": PARTIAL,
    "mixtral": PARTIAL,
    "gemma2": PARTIAL,
    "olmo2": PARTIAL,
    "granite": PARTIAL,
    "smollm3": PARTIAL,
    "gpt_oss": PARTIAL,
    "phi3": {*SCALINGS} - {"default", "longrope", "half"},
    "glm4": {"longrope"},  # these have a factor for each pair of a whole head, of which GLM rotates half
    "gemma3_text": PARTIAL,
    "olmo3": PARTIAL,
}


def config_of(family: str, scaling: dict[str, Any], tokens: int, **values: Any) -> Config:
    """A small model whose rotary embedding can tell the types apart."""
    windowed = family in ("gemma2", "gpt_oss", "gemma3_text", "olmo3")
    model = ModelConfig(
        family=family,
        hidden_size=64,
        num_key_value_heads=2,
        vocab_size=64,
        intermediate_size=96,
        num_layers=2 if windowed else 1,
        head_dim=DIM,
        max_position_embeddings=LONGEST,
        rope_theta=THETA,
        rope_scaling=scaling,
        sliding_window=8 if windowed else 0,
    )
    if family in ("gpt_oss", "mixtral", "qwen3_moe"):
        values = {"num_experts": 4, "num_experts_per_token": 2} | values
    for key, value in values.items():
        setattr(model, key, value)
    if windowed:
        model.extra = {"layer_types": ["sliding_attention", "full_attention"]} | model.extra
    model.validate()
    return Config(model=model, seq_len=SeqLenConfig(tokens=tokens))


def seen(config: Config) -> list[observation.Rotation]:
    """The angles of a model that passes verification."""
    network = verification.outline(hf_config(config.model), config.model)
    verification.check(network, config, AttentionKind.sdpa)
    return observation.watch(network, config.seq_len.tokens).rotations


def formula(scaling: dict[str, Any], tokens: int, theta: float = THETA) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair, in fp64, and the scale: the definitions of the papers that introduced the types."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    dim = int(DIM * scaling.get("partial_rotary_factor", 1.0))
    factor, original = scaling.get("factor", 1.0), scaling.get("original_max_position_embeddings", LONGEST)
    pairs = range(dim // 2)
    if kind == "dynamic":
        theta *= (factor * max(tokens, LONGEST) / LONGEST - (factor - 1)) ** (dim / (dim - 2))
    plain = [theta ** (-2 * i / dim) for i in pairs]
    if kind == "linear":
        return torch.tensor([one / factor for one in plain], dtype=torch.float64), 1.0
    if kind == "su":
        longer = scaling["long_factor" if tokens > original else "short_factor"]
        scale = math.sqrt(1 + math.log(LONGEST / original) / math.log(original))
        return torch.tensor([one / stretch for one, stretch in zip(plain, longer, strict=True)]).double(), scale
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]

        def bent(one: float) -> float:
            turns = original * one / (2 * math.pi)
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
            return one * (kept + (1 - kept) / factor)

        return torch.tensor([bent(one) for one in plain], dtype=torch.float64), 1.0
    if kind == "yarn":
        at = [
            dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))
        ]
        if scaling.get("truncate", True):
            at = [math.floor(at[0]), math.ceil(at[1])]
        low, high = max(at[0], 0), min(at[1], dim - 1)
        high += 0.001 * (low == high)
        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in pairs]
        mixed = [one * (part / factor + 1 - part) for one, part in zip(plain, ramp, strict=True)]
        weights = [scaling.get(name, default) for name, default in (("mscale", 1.0), ("mscale_all_dim", 0.0))]
        over, under = (1 + 0.1 * weight * math.log(factor) for weight in weights)
        return torch.tensor(mixed, dtype=torch.float64), over / under
    return torch.tensor(plain, dtype=torch.float64), 1.0


def assert_rotates(rotation: observation.Rotation, scaling: dict[str, Any], tokens: int, theta: float = THETA) -> None:
    expected, scale = formula(scaling, tokens, theta)
    layouts = (expected, expected.repeat(2), expected.repeat_interleave(2))
    same = [
        rotation.inv_freq.shape == one.shape and torch.allclose(rotation.inv_freq, one, rtol=2e-5) for one in layouts
    ]
    assert any(same), (rotation.inv_freq, expected)
    assert float(rotation.factor.min()) == pytest.approx(scale) == pytest.approx(float(rotation.factor.max()))


@pytest.mark.parametrize("family", REFUSED)
def test_each_type_is_rotated_as_defined_or_refused(family: str) -> None:
    refused = set()
    for name, scaling in SCALINGS.items():
        # Beyond the published length, where the two types that depend on the length do so.
        tokens = 1000
        try:
            rotations = seen(config_of(family, scaling, tokens))
        except ConfigError as error:
            assert str(error).startswith("model.rope_scaling"), error
            refused.add(name)
            continue
        full = [one for one in rotations if one.layer_type in (None, "full_attention")]
        assert full
        for rotation in full:
            share = {"partial_rotary_factor": 0.5} if family == "glm4" else {}
            assert_rotates(rotation, share | scaling, tokens)
    assert refused == REFUSED[family]


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_types_that_depend_on_the_length_follow_it(name: str) -> None:
    for tokens in (64, LONGEST, 5000):
        (rotation,) = seen(config_of("llama", SCALINGS[name], tokens))
        assert_rotates(rotation, SCALINGS[name], tokens)


def test_layers_with_a_window_keep_the_rule_of_their_family() -> None:
    linear = SCALINGS["linear"]

    def by_type(family: str, scaling: dict[str, Any], **values: Any) -> dict[str | None, observation.Rotation]:
        return {one.layer_type: one for one in seen(config_of(family, scaling, 100, **values))}

    gemma = by_type("gemma3_text", linear)
    assert_rotates(gemma["full_attention"], linear, 100)
    assert_rotates(gemma["sliding_attention"], {}, 100, theta=1e4)
    # Gemma's own key in older files, and the same by layer type.
    for other in (
        by_type("gemma3_text", linear, extra={"rope_local_base_freq": 777.0}),
        by_type("gemma3_text", {"full_attention": linear, "sliding_attention": {"rope_theta": 777.0}}),
    ):
        assert_rotates(other["full_attention"], linear, 100)
        assert_rotates(other["sliding_attention"], {}, 100, theta=777.0)
    # OLMo 3 has one base for all layers, and scales full attention alone.
    olmo = by_type("olmo3", SCALINGS["yarn, whole"])
    assert_rotates(olmo["full_attention"], SCALINGS["yarn, whole"], 100)
    assert_rotates(olmo["sliding_attention"], {}, 100)


ALL_SLIDING = {"layer_types": ["sliding_attention"] * 2}  # as the first five layers of Gemma 3 are


@pytest.mark.parametrize(
    ("family", "scaling", "values", "says"),
    [
        (
            "gemma3_text",
            SCALINGS["linear"],
            {"extra": ALL_SLIDING},
            r"rope_scaling: .* reaches no layer: .* full_attention",
        ),
        ("llama", {"full_attention": SCALINGS["linear"]}, {}, r"rope_scaling: .* one rotary embedding for all layers"),
        ("gemma3_text", {"global": SCALINGS["linear"]}, {}, r"rope_scaling.global: .* use .*full_attention"),
        ("gpt2", SCALINGS["linear"], {}, r"rope_scaling: .* no rotary embedding in transformers' gpt2"),
        (
            "llama",
            {},
            {"extra": {"partial_rotary_factor": 0.75}},
            r"extra.* set model.rope_scaling.partial_rotary_factor",
        ),
        (
            "phi3",
            {},
            {"extra": {"partial_rotary_factor": 0.75}},
            r"extra.* set model.rope_scaling.partial_rotary_factor",
        ),
        ("llama", {}, {"extra": {"rope_theta": 5e5}}, r"extra.rope_theta: .* set model.rope_theta"),
        (
            "llama",
            {},
            {"extra": {"original_max_position_embeddings": 64}},
            r"extra.* set model.rope_scaling.original_max",
        ),
    ],
)
def test_a_family_without_it_refuses(family: str, scaling: dict[str, Any], values: dict[str, Any], says: str) -> None:
    # GPT-2 has as many key heads as query heads, and MLPs of four times its width.
    alike = {"num_key_value_heads": 4, "intermediate_size": 256, "rope_theta": 1e4} if family == "gpt2" else {}
    with pytest.raises(ConfigError, match=f"^model.{says}"):
        seen(config_of(family, scaling, 100, **alike, **values))
