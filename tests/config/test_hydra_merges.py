"""Mappings on the command line: an empty one and a rotary embedding of another type replace the option's; no value is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldft.config import from_dict, to_dict
from ldft.errors import ConfigError
from ldft.runner import checks
from tests.conftest import Done, compose, compose_afresh
from tests.training.test_published_configs import published

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
GIVEN: dict[str, dict[str, Any]] = {
    "model.rope_scaling={}": {},
    "model.rope_scaling={rope_type:yarn,factor:4.0}": YARN,
    "model.rope_scaling={type:yarn,factor:4.0}": {"type": "yarn", "factor": 4.0},
    "model.rope_scaling={rope_type:default}": {"rope_type": "default"},
    "model.rope_scaling={factor:4.0}": LLAMA3 | {"factor": 4.0},
    "model.rope_scaling={rope_type:llama3,factor:4.0}": LLAMA3 | {"factor": 4.0},
    "model.rope_scaling.factor=4.0": LLAMA3 | {"factor": 4.0},
    "model.rope_scaling={full_attention:{rope_type:yarn,factor:4.0}}": {"full_attention": YARN},
}


@pytest.mark.parametrize("make", [compose, compose_afresh])
@pytest.mark.parametrize("override", GIVEN)
def test_a_rotary_embedding_of_another_type_replaces_the_options(override: str, make: Callable[..., Any]) -> None:
    assert make("model=llama3_1b", override).model.rope_scaling == GIVEN[override]


def test_what_comes_later_is_merged_into_it() -> None:
    words = ("model=llama3_1b", "model.rope_scaling={rope_type:yarn,factor:4.0}", "model.rope_scaling.beta_fast=16")
    assert compose(*words).model.rope_scaling == YARN | {"beta_fast": 16}
    by_layer = "model.rope_scaling={full_attention:{rope_type:linear,factor:2.0},sliding_attention:{rope_theta:9.0}}"
    later = "model.rope_scaling={full_attention:{rope_type:yarn,factor:4.0}}"
    expected = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 9.0}}
    assert compose("model=gemma3_4b", by_layer, later).model.rope_scaling == expected


def test_an_empty_mapping_replaces_in_every_open_section() -> None:
    assert compose("model=llama3_1b").model.extra and not compose("model=llama3_1b", "model.extra={}").model.extra
    words = ("offload.deepspeed={zero_optimization:{sub_group_size:7}}", "offload.deepspeed={}")
    assert compose(*words).offload.deepspeed == {}


def test_an_empty_mapping_beside_from_hf(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published("meta-llama/Llama-3.1-8B")))
    words = ("model=from_hf", "launch.device=cpu", f"model.path={tmp_path}")
    config = compose(*words, "model.rope_scaling={}")
    checks.resolve(config)
    assert config.model.rope_parameters()[""] == {"rope_type": "default", "rope_theta": 500000.0}
    with pytest.raises(ConfigError, match=r"^model.extra: \{\} would leave the keys of config.json"):
        compose(*words, "model.extra={}")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.seed=???", "train.seed"),
        ("seq_len.tokens=???", "seq_len.tokens"),
        ("model.name=???", "model.name"),
        ("results.dir=???", "results.dir"),
        ("kernels.liger=???", "kernels.liger"),
        ("model.extra={rms_norm_eps:???}", "model.extra.rms_norm_eps"),
        ("optimizer.betas=[0.1,???]", "optimizer.betas[1]"),
    ],
)
def test_a_mandatory_value_that_is_missing_is_refused(override: str, key: str, here: Callable[..., Done]) -> None:
    done = here("model=nano", "launch.device=cpu", override)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"ldft: {key}: ??? is a mandatory value that nobody gave; give one, ")


def test_a_missing_value_in_a_file_is_refused(tmp_path: Path, here: Callable[..., Done]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nnum_layers: ???\n")
    done = here("--config-dir", str(tmp_path), "model=mine", "launch.device=cpu", "dry_run=true")
    assert done.exit_code == 2 and done.stderr.startswith(
        "ldft: model.num_layers: ??? in model/mine.yaml is a mandatory"
    )
    stored = to_dict(compose("model=nano"))
    stored["train"]["seed"] = "???"
    with pytest.raises(ConfigError, match=r"^train.seed: \?\?\? is a mandatory value"):
        from_dict(stored)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.seed=", "train.seed: empty; give a whole number"),
        ("kernels.liger=", "kernels.liger: empty; give "),
        ("hydra=x", "hydra: 'x' is no option; write hydra.<key>=<value>"),
        ("model=???", "model: '???' does not exist; use one of "),
    ],
)
def test_a_value_that_is_empty_or_no_option_is_named_as_such(
    override: str, says: str, here: Callable[..., Done]
) -> None:
    done = here("launch.device=cpu", override)
    assert done.exit_code == 2 and done.stderr.startswith(f"ldft: {says}") and done.stderr.count("\n") == 1


def test_an_option_that_is_not_utf8_is_named(tmp_path: Path, here: Callable[..., Done]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bin.yaml").write_bytes(b"name: \xff\xfe\n")
    done = here("--config-dir", str(tmp_path), "model=bin", "launch.device=cpu")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("ldft: ")
        and f"{tmp_path}/model/bin.yaml: not UTF-8 (byte 6); save it as UTF-8" in done.stderr
    )
