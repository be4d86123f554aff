"""Predicted times against measured rows, and against what they must not depend on."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pandas as pd
import pytest

from ldft import environment
from ldft.config import Config, OffloadDevice, from_dict
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.memory.cost_model import Bandwidths
from ldft.planning import iteration_time
from ldft.planning.rates import Rates, from_datasheet
from ldft.preflight.selection import Selection, select
from tests.conftest import compose

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def h200(update: float = 124e9) -> Rates:
    """update: bytes a second of the host's update. Most rows' hosts were as in benchmarks/results/nodes-h200.parquet: 124 GB/s,
    copies 54.5. The factors of a datasheet's peaks were rounded with the rows of such hosts in sight: those show that the
    formula holds, not its error on others."""
    host = Bandwidths(cpu={0: update}, h2d={0: 54.5e9}, d2h={0: 54.5e9}, link_h2d=54.5e9, link_d2h=54.5e9)
    return from_datasheet(peak=989e12, device_memory=4.8e12, host=host)


H200 = h200()
# Files whose hosts updated faster, as `python -m ldft.bench nodes` said there, or as the row of the update alone does.
UPDATES = {"share-llama3_3b-8k-h200": 142e9, "overlap-llama3_3b-8k-h200": 165e9}
# File, contender, and how far off a prediction from datasheets may be.
ROWS = [
    ("share-llama3_3b-32k-h200", "ours-offload", 0.05),
    ("share-llama3_3b-32k-h200", "plain-in-gpu", 0.05),
    ("keep_attention-llama3_3b-32k-h200", "ours-offload-keep-attention", 0.05),
    ("share-llama3_1b-16k-h200", "ours-offload", 0.05),
    ("share-llama3_1b-16k-h200", "plain-in-gpu", 0.06),
    ("share-llama3_1b-8k-h200", "ours-offload-quarter-share", 0.05),
    ("share-llama3_1b-8k-h200", "ours-offload", 0.05),
    ("share-llama3_3b-8k-h200", "ours-offload-no-share", 0.05),
    ("share-llama3_3b-8k-h200", "ours-offload", 0.05),
    ("overlap-llama3_3b-8k-h200", "ours-offload-no-share", 0.05),
    ("share-llama3_3b-8k-h200", "plain-in-gpu", 0.08),
    ("training-llama3_3b-32k-in-gpu-h200", "ours-in-gpu-recompute-less", 0.05),
    ("training-llama3_3b-32k-offload-h200", "ours-offload-stock-step", 0.05),
    ("share-llama3_8b-32k-h200", None, 0.05),
]


def in_gpu(config: Config) -> Config:
    """As the plain script runs: all in GPU memory, every layer recomputed."""
    offload = dataclasses.replace(config.offload, stage=0, parameters=OffloadDevice.none, optimizer=OffloadDevice.none)
    inputs = dataclasses.replace(
        config.checkpointing, mode=CheckpointingMode.gpu, keep_attention=KeepAttention.none, device_inputs=None
    )
    return dataclasses.replace(config, offload=offload, checkpointing=inputs)


def of_row(name: str, contender: str | None) -> tuple[Selection, float]:
    """The run of a row, and its median seconds an iteration."""
    rows = pd.read_parquet(RESULTS / f"{name}.parquet")
    rows = rows[rows["contender"] == contender] if contender else rows
    values = json.loads(rows.iloc[0]["config_json"]) | {"asked": {}}
    config = from_dict(values)
    warm = [int(count) for count in rows["warmup_iterations"]]
    times = [t for times, count in zip(rows["iteration_s"], warm, strict=True) for t in list(times)[count:]]
    plain = str(contender).startswith("plain")
    with environment.assumed(environment.Assumed(1, 139.7)):
        run = dataclasses.replace(select(in_gpu(config) if plain else config), mlp_tiles=1)  # older than tiles
    if not plain:
        size = json.loads(rows.iloc[0]["deepspeed_config_json"])["zero_optimization"].get(
            "sub_group_size", 1_000_000_000
        )
        beside = rows.iloc[0]["update_s"] is not None if "update_s" in rows else False
        share = size if size != 1_000_000_000 and config.offload.optimizer is OffloadDevice.cpu else 0
        run = dataclasses.replace(run, gpu_share=share, overlap_step=beside)
        if contender == "ours-offload-stock-step":
            run = dataclasses.replace(run, fused_step=False)
    return run, statistics.median(times)


@pytest.mark.parametrize(("name", "contender", "within"), ROWS)
def test_a_prediction_from_datasheets_is_near_what_was_measured(
    name: str, contender: str | None, within: float
) -> None:
    run, measured = of_row(name, contender)
    times = iteration_time.predict(run, h200(UPDATES.get(name, 124e9)))
    assert times.iteration_s == pytest.approx(measured, rel=within)


def run_of(*overrides: str) -> Selection:
    config = compose("model=llama3_3b", "seq_len=8k", "launch.device=cuda", *overrides)
    with environment.assumed(environment.Assumed(2, 139.7)):
        return select(config)


def seconds(run: Selection, rates: Rates = H200) -> float:
    return iteration_time.predict(run, rates).iteration_s


def test_what_is_done_twice_takes_twice_as_long() -> None:
    once, twice = (
        iteration_time.predict(run_of("offload=none", f"train.gradient_accumulation_steps={n}"), H200) for n in (1, 2)
    )
    assert (twice.forward_s, twice.backward_s) == pytest.approx((2 * once.forward_s, 2 * once.backward_s))
    assert twice.step_s == once.step_s


def test_recomputation_costs_a_forward_pass_less_the_last_product_and_a_kept_attention_nothing() -> None:
    none, every, kept = (
        iteration_time.predict(run_of("offload=none", *more), H200)
        for more in (
            ["checkpointing=none"],
            ["checkpointing=gpu"],
            ["checkpointing=gpu", "checkpointing.keep_attention=device"],
        )
    )
    again, without_attention = every.backward_s - none.backward_s, kept.backward_s - none.backward_s
    tokens, layers, heads = 8192, 28, 24 * 128
    attention = layers * 2.0 * tokens**2 * heads / H200.attention_of(128, tokens)[0]
    down = layers * 2.0 * tokens * 8192 * 3072 / H200.products
    loss = 3 * 2.0 * tokens * 128256 * 3072 / H200.products
    assert again == pytest.approx(none.forward_s - H200.resident.forward - loss - down, rel=1e-6)
    assert again - without_attention == pytest.approx(attention, rel=1e-6)


def test_an_update_that_does_not_overlap_is_waited_for_and_one_that_does_is_hidden_as_far_as_possible() -> None:
    beside = run_of("offload=full")
    within = dataclasses.replace(beside, overlap_step=False)
    slow, fast = (
        dataclasses.replace(H200, host=dataclasses.replace(H200.host, cpu={0: rate})) for rate in (20e9, 4e12)
    )
    assert iteration_time.predict(beside, fast).exposed_s < 0.05 * iteration_time.predict(beside, slow).exposed_s
    assert seconds(beside, fast) < seconds(within, fast) and seconds(beside, slow) < seconds(within, slow)
    serial = iteration_time.predict(within, slow)
    assert serial.update_s == serial.exposed_s == pytest.approx(28 * 3_212_749_824 / 20e9)
    assert iteration_time.predict(beside, slow).bound == "host update"


def test_a_slow_link_is_waited_for_and_bounds_the_iteration() -> None:
    slow = dataclasses.replace(H200, host=dataclasses.replace(H200.host, link_h2d=5e9, link_d2h=5e9))
    times = iteration_time.predict(run_of("offload=full"), slow)
    assert times.bound == "link" and times.forward_s >= 2 * 3_212_749_824 / 5e9
    in_gpu = run_of("offload=none", "checkpointing=gpu")
    assert seconds(in_gpu, slow) == seconds(in_gpu)


def test_frozen_weights_have_no_gradients_and_no_update() -> None:
    whole, adapters = (iteration_time.predict(run_of("offload=full", lora), H200) for lora in ("lora=none", "lora=r16"))
    assert adapters.backward_s < whole.backward_s and adapters.update_s < 0.02 * whole.update_s


def test_windows_save_attention_where_the_kernel_skips_what_lies_outside() -> None:
    long = ("model=mistral_7b", "seq_len=64k", "launch.device=cuda", "offload=full")
    runs = [run_of(*long, "attention=sdpa", f"model.sliding_window={window}") for window in (0, 4096)]
    masked = seconds(runs[1])
    assert masked > seconds(runs[0]), "a mask computes all pairs, not the causal half"
    flash = dataclasses.replace(runs[1], attention=type(runs[1].attention).flash_attention_2)
    assert seconds(flash) < seconds(runs[0])


def test_experts_count_as_those_that_compute_a_token() -> None:
    sparse = ("model=qwen3_30b_a3b", "seq_len=8k", "launch.device=cuda", "offload=full")

    def arithmetic(*more: str) -> float:
        return iteration_time.predict(run_of(*sparse, *more), H200).arithmetic_s

    assert arithmetic("model.num_experts_per_token=4") < 0.9 * arithmetic()
    assert arithmetic("model.num_experts=256") == pytest.approx(arithmetic(), rel=0.02), "the router is wider"


def test_attention_rates_between_measured_lengths_are_between_them() -> None:
    rates = dataclasses.replace(
        H200, attention={128: {8192: (100.0, 50.0), 32768: (300.0, 90.0)}, 64: {8192: (1.0, 1.0)}}
    )
    assert rates.attention_of(128, 16384) == pytest.approx((200.0, 70.0))
    assert rates.attention_of(128, 1024) == (100.0, 50.0) and rates.attention_of(112, 1 << 20) == (300.0, 90.0)
    assert rates.attention_of(72, 8192) == (1.0, 1.0)


def test_the_host_update_can_be_the_bound() -> None:
    times = iteration_time.Times(
        forward_s=1, backward_s=2, step_s=4, update_s=3, exposed_s=0, arithmetic_s=2, launch_s=1, link_s=1
    )
    assert times.bound == "host update"
