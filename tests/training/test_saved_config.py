"""The config.json beside pretrained weights: a model that it does not describe is refused in the parent, by key and both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldft.config import Config
from ldft.errors import ConfigError
from ldft.preflight.selection import select
from ldft.runner import checks
from ldft.training.architecture import hf_config
from tests.conftest import FAST, Done, compose

WORDS = ("launch.device=cpu", "model.weights=pretrained")


def written(folder: Path, *overrides: str, **changes: Any) -> Path:
    """A config.json as a run of nano saves it, with changes."""
    folder.mkdir(exist_ok=True)
    values = json.loads(hf_config(compose("model=nano", *overrides).model).to_json_string(use_diff=False))
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(values | {"architectures": ["LlamaForCausalLM"]}))
    return folder


def notes(folder: Path, *overrides: str, model: str = "nano") -> list[str]:
    from ldft.training import saved_config

    config: Config = compose(f"model={model}", *WORDS, f"model.path={folder}", *overrides)
    checks.resolve(config)
    return saved_config.check(config, folder, given="model" in config.asked)


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        notes(folder, *overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, "model.rope_theta: 10000.0, but {} has 500000.0: not the model of these "
         "weights; use model.rope_theta=500000.0, or model=from_hf"),
        ({"rms_norm_eps": 1e-3}, "model.extra.rms_norm_eps: 1e-06, but {} has 0.001"),
        ({"hidden_act": "gelu"}, 'model.extra.hidden_act: "silu", but {} has "gelu"'),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}, "model.num_attention_heads: 4, but {} has 2"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 'model.rope_scaling: {{"rope_type": "default"}}, but {}'),
    ],
)  # fmt: skip
def test_another_model_of_the_same_shapes_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = written(tmp_path, **changes)
    assert refusal(folder).startswith(says.format(folder / "config.json"))


def test_every_key_that_differs_is_named(tmp_path: Path) -> None:
    said = refusal(written(tmp_path, rms_norm_eps=1e-3, rope_parameters={"rope_theta": 5e5}))
    assert "model.rope_theta" in said and "model.extra.rms_norm_eps" in said and "500000.0" in said and "0.001" in said


def test_the_same_model_and_what_is_of_training_alone(tmp_path: Path) -> None:
    assert notes(written(tmp_path)) == []
    assert notes(tmp_path, "model.num_layers=1") == []  # the first layer, on purpose
    folder = written(tmp_path, attention_dropout=0.1, initializer_range=0.5)
    assert notes(folder) == [f"model.extra.attention_dropout: 0.0, while {folder}/config.json has 0.1"]
    assert notes(written(tmp_path), "model.max_position_embeddings=8192")[0].startswith(
        "model.max_position_embeddings: 8192"
    )
    assert refusal(tmp_path, "model.family=mistral").startswith("model.family: mistral, but ")


def test_a_key_beside_from_hf_is_meant_and_noted(tmp_path: Path) -> None:
    folder = written(tmp_path, rope_parameters={"rope_theta": 5e5})
    assert notes(folder, model="from_hf") == []
    said = notes(folder, "model.rope_theta=1e6", model="from_hf")
    assert said == [f"model.rope_theta: 1000000.0, while {folder}/config.json has 500000.0"]


def test_without_a_file_the_row_says_that_nothing_was_compared(tmp_path: Path) -> None:
    assert "no config.json in" in notes(tmp_path)[0]


def test_the_parent_refuses_it_and_the_row_has_the_notes(tmp_path: Path, ldft: Callable[..., Done]) -> None:
    import torch

    from ldft.training import model

    config = compose("model=nano", "offload=none", "launch.device=cpu", "train.precision=fp32")
    folder = tmp_path / "saved"
    model.build(select(config), torch.device("cpu")).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"attention_dropout": 0.1}))
    words = (*WORDS, f"model.path={folder}", "train.precision=fp32")
    done = ldft(*words)
    assert done.exit_code == 0, done.stderr
    assert f"model.extra.attention_dropout: 0.0, while {folder}/config.json has 0.1" in list(done.row.notes)
    (folder / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    for more in ((), ("dry_run=true",)):
        refused = ldft(*words, *more, base=FAST)
        assert refused.exit_code == 2 and refused.stderr.startswith("ldft: model.extra.rms_norm_eps: 1e-06, but ")
