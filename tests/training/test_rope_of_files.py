"""Rotary embeddings as published files write them, beyond what every family reads: accepted, and rotated as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldft.config import AttentionKind, ModelConfig, rope
from ldft.errors import ConfigError
from ldft.training import config_json, hf_import, verification
from ldft.training.architecture import hf_config
from tests.conftest import compose
from tests.training.test_published_configs import published

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "vocab_size": 128}  # fmt: skip
# Of meta-llama/Llama-4-Scout-17B-16E, microsoft/Phi-3.5-MoE-instruct, NousResearch/Yarn-Llama-2-7b-64k, tencent/Hunyuan-7B-Instruct
# and microsoft/Phi-3-mini-128k-instruct as it was first published, with the lists shortened to the small heads.
FILES: dict[str, dict[str, Any]] = {
    "scout": {
        "model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1, "max_position_embeddings": 10485760,
        "intermediate_size_mlp": 96, "attention_chunk_size": 8192, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "phimoe": {
        "model_type": "phimoe", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 10000.0,
        "rope_scaling": {"long_factor": [2.0 + i for i in range(8)], "long_mscale": 1.243163121016122,
                         "original_max_position_embeddings": 4096, "short_factor": [1.0] * 8, "short_mscale": 1.25,
                         "type": "longrope"},
    },
    "yarn": {
        "model_type": "llama", "max_position_embeddings": 65536, "rope_theta": 10000.0,
        "rope_scaling": {"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "su": {
        "model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0, "pad_token_id": 0,
        "rope_scaling": {"long_factor": [2.0 + i for i in range(8)], "short_factor": [1.0] * 8, "type": "su"},
    },
    "hunyuan": {
        "model_type": "hunyuan_v1_dense", "max_position_embeddings": 32768, "rope_theta": 10000.0,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "type": "dynamic"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_published_rotary_embedding_is_read_and_arrives(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | FILES[name]))
    config = compose("model=nano", "launch.device=cpu", "seq_len.tokens=64")
    config.model = hf_import.convert(config_json.read(str(tmp_path), "")).model
    verification.check(verification.outline(hf_config(config.model), config.model), config, AttentionKind.sdpa)
    scaling = config.model.rope_scaling
    for key, value in {key: value for key, value in FILES[name]["rope_scaling"].items() if key != "type"}.items():
        assert scaling[key] == value
    if name in ("hunyuan", "phimoe"):  # the check sees these values: with others it fails
        changed = "alpha" if name == "hunyuan" else "short_mscale"
        network = verification.outline(hf_config(config.model), config.model)
        config.model.rope_scaling = scaling | {changed: 2.0}
        with pytest.raises(ConfigError, match="does not arrive"):
            verification.check(network, config, AttentionKind.sdpa)


def test_the_older_name_of_longrope_is_the_same_model(tmp_path: Path) -> None:
    found = []
    for kind in ("su", "longrope"):
        values = published("microsoft/Phi-3-mini-128k-instruct")
        values["rope_scaling"]["type"] = kind
        (tmp_path / "config.json").write_text(json.dumps(values))
        found.append(hf_import.convert(config_json.read(str(tmp_path), "")).model)
    assert found[0] == found[1] and found[0].rope_scaling[rope.ORIGINAL] == 4096


def test_what_one_family_reads_is_refused_for_others() -> None:
    for scaling in ({"type": "dynamic", "factor": 1.0, "alpha": 1000.0}, {**FILES["phimoe"]["rope_scaling"]}):
        with pytest.raises(ConfigError, match=r"rope_scaling.(alpha|long_mscale): rope_type=\w+ has no such parameter"):
            ModelConfig(rope_scaling=scaling).validate()
