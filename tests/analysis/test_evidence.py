"""The table of a sweep's speeds in the documentation."""

from __future__ import annotations

from typing import Any

from multirun_analysis import evidence, load
from tests.analysis.conftest import Rows, settings


def test_each_number_is_a_rows_and_what_failed_or_was_not_run_is_seen(rows: Rows) -> None:
    def add(*overrides: str, seconds: float = 1.0, **columns: Any) -> None:
        made = settings("model=llama3_1b", "seq_len=8k", *overrides)
        rows.add(**made, iteration_s=[seconds] * 3, **columns)

    add("offload=none", "checkpointing=gpu", seconds=1.0, peak_vram_allocated_gib=[23.06], peak_host_gib=1.5)
    add("offload=full", "checkpointing=gpu", seconds=2.0)
    add("offload=full", "checkpointing=cpu", seconds=4.0, peak_vram_allocated_gib=[5.0], peak_host_gib=20.96)
    add("offload=full", "checkpointing=cpu", "optimizer.overlap_step=false", seconds=8.0)
    add("offload=optimizer", "checkpointing=gpu", status="invalid", error_type="DoesNotFitError")
    heads, _, line = (
        [cell.strip() for cell in text.strip("|").split("|")]
        for text in evidence.speeds(load(rows.folder)).splitlines()
    )
    assert dict(zip(heads, line, strict=True)) == {
        "model": "llama3_1b",
        "tokens": "8k",
        "in GPU memory": "8192",
        "`offload=full`": "4096",
        "`checkpointing=cpu`": "2048",
        "`optimizer.overlap_step=false`": "1024",
        "`offload=optimizer`": "does not fit",
        "`offload=seed`": "-",
        "`plan=fastest`": "-",
        "VRAM, GiB": "23.1 / 5.0",
        "host, GiB": "1.5 / 21.0",
    }
