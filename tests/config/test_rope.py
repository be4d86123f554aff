"""model.rope_scaling as people write it: the same embedding under old and new names, and one line for what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from ldft.config import ModelConfig, rope
from ldft.errors import ConfigError

LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ({}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 64.0}, {"rope_type": "linear", "factor": 64.0}),
        ({"type": "linear", "rope_type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2}),
        ({"type": "su", **LONG}, {"rope_type": "longrope", **LONG}),
        ({"type": "su", "rope_type": "longrope", **LONG}, {"rope_type": "longrope", **LONG}),
        ({"rope_type": "default", "rope_theta": 10000.0}, {"rope_type": "default"}),
        ({"factor": None, "partial_rotary_factor": 0.5}, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_old_names_and_nulls_mean_the_same(written: dict[str, Any], means: dict[str, Any]) -> None:
    model = ModelConfig(rope_scaling=written)
    model.validate()
    assert model.rope_parameters() == {"": means | {"rope_theta": 10000.0}}
    assert model.rope_scaling == written  # the run's identity is made of it


def test_parameters_by_layer_type_stay_apart() -> None:
    asked = {"full_attention": {"type": "linear", "factor": 8.0}, "sliding_attention": {"rope_theta": 5000.0}}
    assert ModelConfig(rope_scaling=asked).rope_parameters() == {
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }


def test_the_published_length_may_stand_beside_them() -> None:
    given = {name: value for name, value in LONG.items() if name != rope.ORIGINAL} | {"type": "longrope"}
    model = ModelConfig(rope_scaling=given, extra={rope.ORIGINAL: 64})
    assert model.rope_parameters()[""][rope.ORIGINAL] == 64


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"rope_type": "yearn", "factor": 2.0}, r"rope_scaling.rope_type: 'yearn' does not exist; use one of .*yarn"),
        ({"type": ["linear"]}, r"rope_scaling.type: '\['linear'\]' does not exist"),
        ({"type": "mrope", "mrope_section": [2, 3, 3]}, r"rope_scaling.type: 'mrope' is for images and video"),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, r"rope_scaling.mrope_section: .* images and video"),
        (
            {"type": "linear", "rope_type": "yarn", "factor": 2.0},
            r"rope_scaling.type: 'linear' contradicts rope_type=yarn",
        ),
        ({"factor": 8.0}, r"rope_scaling.rope_type: missing, so factor would have no effect"),
        ({"type": "linear"}, r"rope_scaling.factor: missing; rope_type=linear needs factor"),
        (
            {"rope_type": "llama3", "factor": 8.0},
            r"rope_scaling.low_freq_factor: missing; rope_type=llama3 needs factor,",
        ),
        ({"type": "linear", "facter": 8.0}, r"rope_scaling.facter: .* no such parameter; did you mean factor\?"),
        (
            {"type": "linear", "factor": 8.0, "beta_fast": 32},
            r"rope_scaling.beta_fast: 32 has no effect with rope_type=linear",
        ),
        ({"rope_type": "default", "factor": 8.0}, r"rope_scaling.factor: 8.0 has no effect with rope_type=default"),
        ({"type": "linear", "factor": "8"}, r"rope_scaling.factor: '8' is not possible; use a number of 1 or more"),
        ({"type": "linear", "factor": True}, r"rope_scaling.factor: True is not possible"),
        ({"type": "linear", "factor": 0.5}, r"rope_scaling.factor: 0.5 is not possible; use a number of 1 or more"),
        ({"type": "linear", "factor": float("inf")}, r"rope_scaling.factor: inf is not possible"),
        ({"type": "yarn", "factor": 4.0, rope.ORIGINAL: 0.5}, rf"rope_scaling.{rope.ORIGINAL}: 0.5 is not possible"),
        ({"type": "yarn", "factor": 4.0, "truncate": "no"}, r"rope_scaling.truncate: 'no' .* use true or false"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": 0.5}, r"rope_scaling.beta_fast: 0.5 is below beta_slow=1"),
        (
            {"type": "su", **LONG, "long_factor": [1.0]},
            r"rope_scaling.long_factor: 1 number; use 8, one for each pair",
        ),
        ({"type": "su", **LONG, "short_factor": [0] * 8}, r"rope_scaling.short_factor: .* a list of positive numbers"),
        (
            {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1, rope.ORIGINAL: 64},
            r"rope_scaling.high_freq_factor: 1 is not above low_freq_factor=4",
        ),
        ({"partial_rotary_factor": 1.5}, r"rope_scaling.partial_rotary_factor: 1.5 .* above 0, at most 1"),
        ({"partial_rotary_factor": 0.2}, r"rope_scaling.partial_rotary_factor: 0.2 rotates 3 of 16 elements"),
        ({"rope_theta": 5000.0}, r"rope_scaling.rope_theta: 5000 contradicts model.rope_theta=10000"),
        (
            {"full_attention": {}, "factor": 8.0},
            r"rope_scaling.factor: 8.0 stands beside .* move it into full_attention",
        ),
        ({"full_attention": {"type": "linear"}}, r"rope_scaling.full_attention.factor: missing"),
    ],
)
def test_what_cannot_be_is_one_line(written: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.{says}") as error:
        ModelConfig(rope_scaling=written).validate()
    assert "\n" not in str(error.value)
