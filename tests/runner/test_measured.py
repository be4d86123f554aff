"""Columns that the parent computes from what the ranks report."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ldft.runner import measured
from tests.conftest import compose


def test_reports_become_columns_as_the_schema_says() -> None:
    reports: list[dict[str, Any]] = [
        {
            "peak_host_gib": 1.0,
            "peak_vram_allocated_gib": 3.0,
            "loss": [1.0],
            "init": {"init_s": 4.0},
            "phase": "train",
        },
        {
            "peak_host_gib": 2.0,
            "peak_vram_allocated_gib": 5.0,
            "loss": [9.0],
            "init": {"init_s": 8.0},
            "phase": "train",
        },
    ]
    assert measured.from_ranks(reports) == {
        "peak_host_gib": 3.0,
        "peak_vram_allocated_gib": [3.0, 5.0],
        "loss": [1.0],
        "init_s": 4.0,
    }


@pytest.mark.parametrize("name", ["peak_host_gib", "peak_vram_reserved_gib"])
def test_what_one_rank_did_not_reach_is_left_out_of_what_all_make(name: str) -> None:
    assert measured.from_ranks([{name: 1.0}, {}]) == {}


@pytest.mark.parametrize(
    ("skipped", "says"),
    [
        ([1, 1, 0, 0], None),
        (None, None),
        (
            [1, 1, 1, 0],
            "1 of 2 iterations .* too short; use more train.warmup_iterations, or a smaller train.loss_scale$",
        ),
    ],
)
def test_updates_left_out_after_warm_up_are_said(skipped: list[int] | None, says: str | None) -> None:
    found = measured.warnings({"loss": [1.0, 2.0, 1.0, 1.0], "skipped_updates": skipped, "warmup_iterations": 2})
    assert len(found) == bool(says) and all(re.match(says or "", one) for one in found)


def test_ranks_that_share_a_sequence_count_its_tokens_once_and_share_its_flops() -> None:
    words = ("seq_len.tokens=48", "train.micro_batch_size=3", "train.warmup_iterations=1", "train.iterations=3")
    config = compose("model=nano", *words, "launch.num_ranks=4", "launch.sequence_parallel=2")
    assert measured.tokens_per_iteration(config) == 2 * 3 * 48, "two groups"
    report = {
        "iteration_s": [9.0, 2.0, 2.0],
        "model_tflop_dense": 20.0,
        "model_tflop_attention": 4.0,
        "peak_tflops_per_s": 6.0,
    }
    row = measured.columns(config, [], [report] * 4)
    assert row["tokens_per_s"] == 2 * 3 * 48 / 2
    assert row["model_tflops_per_s"] == 24.0 / 4 / 2, "of each of four ranks"
    assert row["mfu"] == 0.5
