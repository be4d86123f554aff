"""Real runs through DeepSpeed: pretrained weights and text on two ranks, offload options, a model of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldft.config import Device
from ldft.preflight.selection import select
from ldft.training import model
from tests.conftest import FAST, compose, long

PHI3 = """
name: phi3_mini
hf_id: microsoft/Phi-3-mini-4k-instruct
family: phi3
num_layers: {layers}
hidden_size: 96
intermediate_size: 192
num_attention_heads: 4
num_key_value_heads: 4
head_dim: 24
vocab_size: 512
max_position_embeddings: 4096
sliding_window: 2047
extra: {{original_max_position_embeddings: 4096}}
"""


@long
def test_pretrained_on_two_ranks_trains_as_the_weights_it_was_saved_from(
    ldft, tmp_path: Path, word_tokenizer: Callable[..., Path]
) -> None:
    words = " ".join(f"w{number}" for number in range(200))
    (tmp_path / "text.txt").write_text(words * 3)
    beside = [
        "model.vocab_size=512", "launch.device=cpu", "launch.num_ranks=2", "data=text", f"data.path={tmp_path}/text.txt",
        f"data.tokenizer={word_tokenizer(words)}", "train.precision=bf16",
    ]  # fmt: skip
    config = compose("model=nano", "offload=none", "train.seed=5", *beside)
    config.launch.device = Device.cpu
    model.build(select(config), torch.device("cpu")).save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    drawn = ldft(*beside, "train.seed=5")
    loaded = ldft(*beside, "train.seed=9", "model.weights=pretrained", f"model.path={tmp_path}/saved")
    assert loaded.exit_code == 0, loaded.stdout + loaded.stderr
    rows = drawn.rows.set_index("cfg.train.seed")
    assert list(rows.status) == ["ok", "ok"]
    assert list(rows.loss[5]) == list(rows.loss[9]) and rows.loss[5][0] > rows.loss[5][-1]
    misfit = ldft(
        *beside, "launch.num_ranks=1", "model.weights=pretrained", f"model.path={tmp_path}/saved", "model.num_layers=3"
    )
    assert misfit.exit_code == 2
    assert misfit.stderr.startswith("ldft: model.path: ") and misfit.stderr.count("\n") == 1
    assert "model.layers.2" in misfit.stderr and "Traceback" not in misfit.stdout


@pytest.mark.parametrize("layers", [2, pytest.param(1, marks=long)])
def test_a_model_added_by_one_yaml_runs(ldft, tmp_path: Path, layers: int) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "phi3_mini.yaml").write_text(PHI3.format(layers=layers))
    offload = "seed" if layers == 2 else "optimizer"
    base = ("--config-dir", str(tmp_path / "mine"), "model=phi3_mini", *FAST[1:])
    done = ldft(f"offload={offload}", "optimizer.schedule=linear", "optimizer.schedule_warmup=1", base=base)
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row["cfg.model.num_layers"] == layers and row["cfg.model.family"] == "phi3"
    assert list(row.learning_rate) == pytest.approx([0.0, 1e-4, 0.5e-4])
    assert list(row.skipped_updates) == [0, 0, 0]
    effective = json.loads(row.deepspeed_config_json)["zero_optimization"]
    assert (effective["stage"], effective.get("sub_group_size")) == ((3, 0) if offload == "seed" else (2, None))


def test_gemma_with_window_and_caps_and_nothing_on_the_host(ldft) -> None:
    small = ("hidden_size=64", "intermediate_size=96", "num_layers=2", "num_attention_heads=4", "num_key_value_heads=2",
             "head_dim=16", "vocab_size=512", "sliding_window=16")  # fmt: skip
    base = ("model=gemma2_9b", *(f"model.{item}" for item in small), *FAST[1:])
    done = ldft("offload=zero3", "data=repeat", "train.precision=fp32", "optimizer.learning_rate=1e-2", base=base)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert done.row.loss[-1] < done.row.loss[0]
