"""Device memory by formula against measured peaks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ldft import environment
from ldft.preflight import decoder_layers, device_estimate, layer_memory, parameter_counts, zero_buckets
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
        "kernels.mlp_tiles=1",
        *(["optimizer.fused_step=false"] if row["offload"] != "none" else []),
    )  # fmt: skip
    peak_gb = sum(resolve(config).estimate.device.values()) / 1e9
    if row["checkpointing"] == "cpu":  # the scripts fetched one layer input at a time; ldft has the next one on its way
        peak_gb -= layer_memory.hidden_bytes(config) / 1e9
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

    assert start() > 1.7  # two copies of 32e9 weights, against one and the norm of the embedding's gradient, in fp64
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
    layer = decoder_layers.largest(compose("model=llama3_1b").model)
    inputs = sum(inputs for inputs, _ in layer.linears.values())
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


def parts(moment: str, *more: str) -> device_estimate.Parts:
    """Bytes by part of llama3_1b at 1024 tokens: 2 B per element, H = 2048, I = 8192, 32 heads."""
    line = ("model=llama3_1b", "seq_len=1k", "launch.device=cuda", "train.precision=bf16")
    return device_estimate.moments(select(compose(*line, *more)))[moment]


def test_attention_that_stores_its_scores_keeps_them_for_each_head() -> None:
    kept = {
        kind: parts("loss", "checkpointing=none", "offload=full", f"attention={kind}")["activations"]
        for kind in ("eager", "sdpa")
    }
    # Two copies in bf16 and one in fp32, which counts as two: 4 w S S heads in each of 16 layers.
    assert kept["eager"] - kept["sdpa"] == 16 * 4 * 2 * 1024 * 1024 * 32


def test_an_adapter_on_the_mlps_last_module_adds_its_inputs_gradient_and_two_of_its_output() -> None:
    inside = {
        modules: parts(
            "backward of the first layers", "checkpointing=gpu", "lora=r16", f"lora.target_modules=[{modules}]"
        )
        for modules in ("q_proj", "q_proj,down_proj")
    }
    assert inside["q_proj,down_proj"]["inside a layer"] - inside["q_proj"]["inside a layer"] == 2 * 1024 * (
        8192 + 2 * 2048
    )


def test_a_reduce_bucket_is_whole_only_where_gradients_are_contiguous_on_a_gpu() -> None:
    def bucket(*more: str) -> int:
        line = ("model=nano", "offload=zero3", *more)
        return device_estimate.moments(select(compose(*line)))["step"]["reduce bucket"]

    sizes = "reduce_bucket_size:500000000,contiguous_gradients"
    contiguous = f"offload.deepspeed.zero_optimization={{{sizes}:true}}"
    apart = f"offload.deepspeed.zero_optimization={{{sizes}:false}}"
    trained = parameter_counts.total(parameter_counts.trained_sizes(compose("model=nano")))
    gpu, cpu = ("launch.device=cuda", "train.precision=bf16"), ("launch.device=cpu", "train.precision=bf16")
    assert bucket(*gpu, contiguous) == 2 * 500_000_000
    assert bucket(*gpu, apart) == bucket(*cpu, contiguous) == bucket(*cpu, apart) == 2 * trained


def test_attentions_output_and_log_sum_exp_are_padded_as_kernels_pad_them() -> None:
    line = ("model=llama3_1b", "seq_len.tokens=1000", "launch.device=cuda", "train.precision=bf16")
    assert layer_memory.attention_bytes(compose(*line)) == 2 * 1000 * 32 * 64 + 4 * 32 * 1024
    narrow = compose(*line, "model.head_dim=60", "train.micro_batch_size=3")
    assert layer_memory.attention_bytes(narrow) == 3 * (2 * 1000 * 32 * 64 + 4 * 32 * 1024)


def test_zero_3_without_offload_holds_a_share_of_weights_gradients_and_optimizer() -> None:
    whole = parameter_counts.total(parameter_counts.trained_sizes(compose("model=llama3_1b")))
    zero = "offload.deepspeed.zero_optimization={sub_group_size:1000}"
    found = parts("step", "offload=zero3", "launch.num_ranks=2", zero)
    assert found["weights"] == pytest.approx(
        2 * whole / 2, rel=1e-6
    )  # each parameter is padded to a multiple of the ranks
    assert found["gradients"] == found["weights"] + 4 * 1000
    assert found["optimizer"] == 6 * found["weights"]


def test_ranks_that_share_a_sequence_have_a_part_of_its_tokens_and_heads() -> None:
    line = ("model=llama3_1b", "seq_len.tokens=1024", "launch.device=cuda", "train.precision=bf16", "offload=full",
            "checkpointing=gpu", "kernels.mlp_tiles=64")  # fmt: skip
    two = compose(*line, "launch.num_ranks=2", "launch.sequence_parallel=2")
    assert layer_memory.hidden_bytes(two) == 2 * 512 * 2048
    # The kernel's log-sum-exp is of whole sequences, for this rank's heads; its output comes back as a part of them.
    assert layer_memory.attention_bytes(two) == 2 * 512 * 32 * 64 + 4 * 16 * 1024
    # In attention's backward pass, where each query head has a key head of its own, what is exchanged is larger than what the
    # kernel holds: 2 Q + K before and after, instead of the queries' gradient in fp32.
    run = select(compose(*line, "model.num_key_value_heads=32", "launch.num_ranks=2", "launch.sequence_parallel=2"))
    assert layer_memory.backward(run, False)[1] + layer_memory.kept(run) == 512 * 2048 * (2 * (3 + 4 + 4) + 2 * 3)
