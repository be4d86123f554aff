"""Liger Kernel: where it is used, that it is really applied, to this model alone, and that its loss trains as the stock one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ldft.config import Config, Device
from ldft.errors import CombinationError, ConfigError
from ldft.preflight import liger
from ldft.preflight.selection import select
from ldft.training import liger_kernels, model
from tests.conftest import compose, long
from tests.training.test_equality import alone, run_once  # noqa: F401

SMALL = (
    "offload=none", "launch.device=cpu", "kernels.liger=false", "train.precision=fp32", "model.num_layers=2",
    "model.hidden_size=64", "model.intermediate_size=96", "model.num_attention_heads=4",
    "model.num_key_value_heads=2", "model.head_dim=16",
    "model.vocab_size=512",
)  # fmt: skip
# Per layer: norms, MLP, attention; then the last norm and the loss. Gemma 2 has four norms a layer; Qwen 3's two within
# attention are Liger's, too.
PATCHED = {family: 2 * 4 + 2 for family in liger.FAMILIES} | {"gemma2": 2 * 6 + 2, "qwen3": 2 * 6 + 2}


def config_of(*overrides: str) -> Config:
    config = compose("model=nano", *overrides)
    config.launch.device = Device[config.launch.device.name.replace("auto", "cpu")]
    return config


def build(*overrides: str):
    return model.build(select(config_of(*SMALL, *overrides)), torch.device("cpu"))


@pytest.mark.parametrize("family", liger.FAMILIES)
def test_every_family_is_patched_and_no_other_model_is(family: str) -> None:
    beside = [f"model.family={family}", *(["model.sliding_window=16"] if family == "gemma2" else [])]
    network, other = build(*beside), build(*beside, "train.seed=1")
    source = vars(sys.modules[type(network).__module__])
    before = dict(source)
    assert liger_kernels.count_modules(network) == 0
    assert liger_kernels.apply(network) == liger_kernels.count_modules(network) == PATCHED[family]
    assert source == before and liger_kernels.count_modules(other) == 0
    tokens = torch.arange(48)[None]
    assert other(input_ids=tokens, labels=tokens).logits is not None
    assert liger_kernels.count_modules(build(*beside)) == 0


def test_used_on_cuda_where_the_family_is_supported_and_refused_in_one_line_elsewhere(monkeypatch) -> None:
    cuda = "launch.device=cuda"
    assert liger.wanted(config_of(cuda)) and liger.wanted(config_of(cuda, "kernels.liger=true"))
    assert not liger.wanted(config_of(cuda, "kernels.liger=false"))
    assert not liger.wanted(config_of("launch.device=cpu"))
    assert not liger.wanted(config_of(cuda, "model.family=stablelm"))
    with pytest.raises(CombinationError, match=r"^kernels.liger: true needs launch.device=cuda, not cpu"):
        liger.wanted(config_of("launch.device=cpu", "kernels.liger=true"))
    with pytest.raises(
        CombinationError, match=r"^kernels.liger: true: no kernels for model.family=stablelm; use false"
    ):
        liger.wanted(config_of(cuda, "model.family=stablelm", "kernels.liger=true"))
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert not liger.wanted(config_of(cuda))
    with pytest.raises(ConfigError, match=r"^kernels.liger: true needs the package liger-kernel; pip install"):
        liger.wanted(config_of(cuda, "kernels.liger=true"))


@long
def test_the_fused_loss_trains_as_the_stock_one_under_zero_3(run_once, tmp_path: Path) -> None:  # noqa: F811
    # The output projection is the embedding: two modules gather one weight, and both give it gradients.
    row = run_once(
        "train.precision=fp32", "model.vocab_size=128", "seq_len.tokens=32", "train.iterations=4",
        "train.gradient_accumulation_steps=2", "offload=full",
    )  # fmt: skip
    assert row["cfg.model.tie_word_embeddings"] and row.loss[-1] < 0.95 * row.loss[0]
    assert alone(row.config_json, tmp_path / "liger", "liger") == pytest.approx(list(row.loss), rel=1e-5)
