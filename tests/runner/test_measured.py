"""Columns that the parent computes from what the ranks report."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ldft.runner import measured


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
