"""Figures of training that README.md gives are those of the rows that it links to, by its own rule: medians after warm-up."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pyarrow.parquet as pq
import pytest

from ldft.environment import PACKAGE_DIR

REPOSITORY = PACKAGE_DIR.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
README = " ".join((REPOSITORY / "README.md").read_text().split())


def rows(name: str) -> list[dict[str, Any]]:
    assert f"benchmarks/results/{name}.parquet" in README
    return pq.read_table(RESULTS / f"{name}.parquet").to_pylist()


def median(row: dict[str, Any], column: str) -> float:
    return statistics.median(row[column][json.loads(row["config_json"])["train"]["warmup_iterations"] :])


def line(row: dict[str, Any], digits: int, *, each: bool) -> str:
    """The end of a table's line: rates, parts, memory. each: with the rate of one GPU, too."""
    rate = row["tokens_per_iteration"] / median(row, "iteration_s")
    parts = " / ".join(f"{median(row, part):.{digits}f}" for part in ("forward_s", "backward_s", "step_s"))
    rates = f"{rate:.0f} | {rate / row['ranks']:.0f}" if each else f"{rate:.0f}"
    return f"| {rates} | {parts} | {max(row['peak_vram_allocated_gib']):.1f} | {row['peak_host_gib']:.1f} |"


@pytest.mark.parametrize(
    ("name", "digits", "each"),
    [
        ("training-llama3_3b-32k-offload-h200", 3, False),
        ("training-llama3_3b-32k-in-gpu-h200", 3, False),
        ("training-llama3_8b-32k-2gpus-h100", 3, True),
        ("scaling-llama3_3b-32k-h100", 3, True),
        ("long_sequences-131072-llama3_3b-h200", 1, False),
        ("long_sequences-llama3_3b-h200", 1, False),
    ],
)
def test_every_run_has_its_line(name: str, digits: int, each: bool) -> None:
    missing = [text for row in rows(name) if (text := line(row, digits, each=each)) not in README]
    assert not missing


def test_two_gpus_against_one() -> None:
    alone, together = (
        row["tokens_per_iteration"] / median(row, "iteration_s") for row in rows("scaling-llama3_3b-32k-h100")
    )
    assert f"two reach {together / 2 / alone:.3f} of it each" in README


def test_adapters() -> None:
    (row,) = rows("lora-llama3_8b-8k-h200")
    rate = row["tokens_per_iteration"] / median(row, "iteration_s")
    memory = f"{max(row['peak_vram_allocated_gib']):.1f} GiB of the GPU, {row['peak_host_gib']:.1f} of the host"
    times = f"{median(row, 'step_s'):.2f} s of the {median(row, 'iteration_s'):.2f} s an iteration being the update"
    assert f"{memory}, {rate:.0f} tokens/s, {times}" in README


def test_rates_of_the_node() -> None:
    rate = {row["kernel"]: row["gb_per_s"] for row in rows("nodes-h200")}
    copies = f"copies at {rate['h2d']:.1f} and {rate['d2h']:.1f} GB/s to and from the GPU"
    assert f"{copies}, AdamW at {rate['adam']:.0f} GB/s" in README


def test_fp16_made_every_update() -> None:
    (row,) = rows("fp16-llama3_1b-2k-offload-h200")
    assert not any(row["skipped_updates"]) and row["config_json"].count('"precision": "fp16"') == 1
    assert f"none of {len(row['skipped_updates'])} updates was skipped" in README
