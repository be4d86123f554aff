"""Device memory by formula against measured peaks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ldft import environment
from ldft.preflight import decoder_layers, device_estimate, zero_buckets
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from tests.conftest import compose

ROWS = list(csv.DictReader((Path(__file__).parent / "measured_vram.csv").read_text().splitlines()[1:]))


# What the scripts ran with; ldft's own are smaller.
SIZES = ",".join(f"{name}:{value}" for name, value in zero_buckets.DEFAULTS.items())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.values()))
def test_the_formula_is_within_five_percent_of_the_measured_peak(row: dict[str, str]) -> None:
    config = compose(
        f"model={row['model']}", f"seq_len.tokens={row['tokens']}", f"train.micro_batch_size={row['batch']}",
        f"launch.num_ranks={row['ranks']}", f"offload={row['offload']}", f"train.precision={row['precision']}",
        *([f"offload.deepspeed.zero_optimization={{{SIZES},contiguous_gradients:true}}"] if row["offload"] == "full" else []),
        f"checkpointing={row['checkpointing']}", f"kernels.liger={row['liger']}", "launch.device=cuda",
    )  # fmt: skip
    peak_gb = sum(resolve(config).estimate.device.values()) / 1e9
    if row["checkpointing"] == "cpu":  # the scripts fetched one layer input at a time; ldft has the next one on its way
        peak_gb -= device_estimate.hidden_bytes(config) / 1e9
    assert peak_gb == pytest.approx(float(row["peak_gb"]), rel=0.05)


def test_what_is_sharded_shrinks_with_the_ranks() -> None:
    def peak(ranks: int, offload: str) -> int:
        line = ("model=llama3_8b", "launch.device=cuda", f"offload={offload}", f"launch.num_ranks={ranks}")
        return sum(resolve(compose(*line)).estimate.device.values())

    assert peak(8, "zero3") < peak(4, "zero3") < peak(2, "zero3")
    assert peak(8, "none") == peak(1, "none")


def test_frozen_weights_are_not_copied_when_training_starts() -> None:
    """ZeRO-1/2 flatten what is trained, on the device where there is room, else in host memory."""

    def start(*more: str) -> float:
        config = compose("model=qwen2_5_32b", "seq_len=4k", "offload=optimizer", "launch.device=cuda", *more)
        moments = device_estimate.moments(select(config))
        return moments["start"]["weights"] / sum(device_estimate.least_of(moments).values())

    assert start() > 1.8  # two copies of 32e9 weights, against one and little else
    assert start("lora=r16") < 1.01


def activations(*more: str) -> int:
    """Bytes that 16 layers of llama3_1b keep of 4096 tokens."""
    line = (
        "model=llama3_1b",
        "seq_len=4k",
        "checkpointing=none",
        "offload=full",
        "launch.device=cuda",
        "attention=sdpa",
    )
    return device_estimate.moments(select(compose(*line, *more)))["loss"]["activations"]


def test_repeated_keys_and_values_are_kept_instead_of_those_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for capability in ((7, 0), (8, 0)):
        monkeypatch.setattr(environment, "compute_capability", lambda here=capability: here)
        kept[capability] = activations("train.precision=fp16")
    # 2 B; 32 heads of queries and 8 of keys and of values, 64 wide.
    assert kept[7, 0] - kept[8, 0] == 16 * 2 * 4096 * 2 * (32 - 8) * 64


def test_dropout_keeps_an_input_and_a_mask_for_each_adapter() -> None:
    modules = decoder_layers.linears(compose("model=llama3_1b").model, sparse=False)
    inputs = sum(inputs for inputs, _ in modules.values())
    assert activations("lora=r16", "lora.dropout=0.1") - activations("lora=r16") == 16 * (2 + 1) * 4096 * inputs
    two = activations("lora=r16", "lora.dropout=0.1", "lora.target_modules=[q_proj,down_proj]") - activations(
        "lora=r16"
    )
    assert two == 16 * (2 + 1) * 4096 * (2048 + 8192)


def test_sdpa_gets_a_mask_of_all_tokens_with_all_for_a_window() -> None:
    def mask(*more: str) -> int:
        line = ("model=mistral_nemo_12b", "seq_len=32k", "launch.device=cuda", *more)
        return resolve(compose(*line)).estimate.device.get("attention mask", 0)

    assert mask("attention=sdpa") == mask("attention=eager", "model.sliding_window=4096") == 0
    assert mask("attention=sdpa", "model.sliding_window=4096") == 3 * 32768**2
