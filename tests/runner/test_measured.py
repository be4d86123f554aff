"""Columns and who fills them: a column without a producer is found by a real run."""

from __future__ import annotations

from typing import Any

import pytest

from ldft import results
from ldft.results.schema import MEASURED
from ldft.runner import measured

# Null in an ok run of one command on a machine without GPUs, and why.
NULL = {
    "sweep": "a single run",
    "signal": "no rank was ended by one",
    "error_type": "nothing failed",
    "error_message": "nothing failed",
    "mfu": "a CPU's peak is not known",
    "peak_vram_allocated_gib": "no device memory",
    "peak_vram_reserved_gib": "no device memory",
    "predicted_vram_gib": "no device memory",
    "predicted_vram_json": "no device memory",
    "numa_mechanism": "numa=default",
    "documents_read": "data=random",
    "documents_skipped": "data=random",
    "sequences_skipped": "data=random",
    "init_data_s": "data=random",
}
# What the machine decides.
EITHER = {
    "driver": "there may be a GPU",
    "modelled_traffic_s": "this machine may have a profile",
    "numa_kernel_weights_json": "since Linux 6.9",
    "git_commit": "this may be a checkout, or not",
    "git_dirty": "likewise",
}


def test_every_column_of_a_run_has_a_producer(ldft) -> None:
    (row,) = results.read_table(ldft("launch.device=cpu").results_dir).to_pylist()
    empty = {column.name for column in MEASURED if row[column.name] is None}
    assert empty - EITHER.keys() == NULL.keys()


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
