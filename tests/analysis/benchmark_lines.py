"""The measured part of every line of docs/benchmarks.md's tables, from the committed rows."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from multirun_analysis import evidence, load, publish

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
LINES = (REPOSITORY / "docs" / "benchmarks.md").read_text().splitlines()
PAGE = " ".join(" ".join(LINES).split())

# Of the rows: name, digits of the times, whether the line also has the rate of one GPU.
TRAINING = [
    ("training-llama3_3b-32k-offload-h200", 3, False),
    ("training-llama3_3b-32k-in-gpu-h200", 3, False),
    ("overlap-llama3_3b-32k-h100", 3, False),
    ("share-llama3_3b-32k-h200", 3, False),
    ("share-llama3_3b-8k-h200", 3, False),
    ("overlap-llama3_3b-8k-h200", 3, False),
    ("share-llama3_1b-16k-h200", 3, False),
    ("share-llama3_1b-8k-h200", 3, False),
    ("keep_attention-llama3_3b-32k-h200", 3, False),
    ("share-llama3_8b-32k-h200", 3, False),
    ("peers-llama3_3b-32k-h200", 3, False),
    ("training-llama3_8b-32k-2gpus-h100", 3, True),
    ("overlap-llama3_8b-32k-2gpus-h200", 3, True),
    ("scaling-llama3_3b-32k-h100", 3, True),
    ("long_sequences-131072-llama3_3b-h200", 1, False),
    ("long_sequences-llama3_3b-h200", 1, False),
    ("long_sequences-plans-h200", 1, False),
    ("long_sequences-393216-llama3_3b-h200", 1, False),
    ("scaling-shared-131072-llama3_3b-2gpus-h200", 1, True),
    ("scaling-shared-peer-131072-llama3_3b-h200", 1, True),
    ("long_sequences-shared-2gpus-h200", 1, True),
]
SHAPES = {
    "checkpoint_offload-3b-8b-h200": {
        "llama3_3b:28:32768": "3B, 32768",
        "llama3_8b:8:32768": "8 layers of 8B, 32768",
        "llama3_8b:8:65536": "8 layers of 8B, 65536",
    },
    "checkpoint_offload-3b-64k-h200": {"llama3_3b:28:65536": "3B, 65536"},
}
WAYS = {
    "ours": "`ldft.memory.allocator.allocate(..., pin=True)`",
    "seed: posix_memalign": "the seed: posix_memalign, one-thread memset, cudaHostRegister",
    "seed: mmap + mbind": "the seed: mmap, mbind, one-thread memset, cudaHostRegister",
    "cudaHostAlloc + memset": "cudaHostAlloc and memset",
    "torch pinned allocator": "torch's pinned allocator",
}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    assert f"benchmarks/results/{name}.parquet)" in PAGE, f"the page does not link to {name}"
    return pq.read_table(RESULTS / f"{name}.parquet").to_pylist()


def script(name: str) -> ModuleType:
    """A module of benchmarks/, whose scripts import each other by name."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", REPOSITORY / "benchmarks" / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def values(item: Any) -> list[float]:
    return json.loads(item) if isinstance(item, str) else item


def counted(row: dict[str, Any], column: str) -> list[float]:
    return row[column][json.loads(row["config_json"])["train"]["warmup_iterations"] :]


def median(row: dict[str, Any], column: str) -> float:
    return statistics.median(counted(row, column))


def rate(row: dict[str, Any]) -> float:
    return row["tokens_per_iteration"] / median(row, "iteration_s")


def training_line(row: dict[str, Any], digits: int, each: bool) -> str:
    """The end of a table's line: rates, parts, memory."""
    parts = " / ".join(f"{median(row, part):.{digits}f}" for part in ("forward_s", "backward_s", "step_s"))
    rates = f"{rate(row):.0f} | {rate(row) / row['ranks']:.0f}" if each else f"{rate(row):.0f}"
    return f"| {rates} | {parts} | {max(row['peak_vram_allocated_gib']):.1f} | {row['peak_host_gib']:.1f} |"


def turns_lines() -> list[str]:
    """Contenders of two rounds: medians over the iterations of both."""
    found = []
    for name in ("overlap-llama3_3b-8k-32cores-h200", "overlap-llama3_3b-8k-16cores-h200"):
        for mine in by(rows(name), "contender").values():
            joined = mine[0] | {
                part: [*mine[0][part], *(sample for row in mine[1:] for sample in counted(row, part))]
                for part in ("iteration_s", "forward_s", "backward_s", "step_s")
            }
            found.append(training_line(joined, 3, False))
    return found


def plan_lines() -> list[str]:
    """One line a cell, from all runs of its plan."""
    mine = pd.read_parquet(RESULTS / "plans-h200.parquet")
    found = []
    for cell, line in script("plans").regret(mine).set_index("cell").iterrows():
        row = mine[(mine["cell"] == cell) & (mine["setting"] == "plan")].iloc[0]
        asked = dict(word.split("=") for word in str(cell).split())
        cells = [f"{asked['model']}, {asked['seq_len']}", asked.get("memory.vram_gib", "-")]
        cells += [f"{line['predicted_s']:.3f}", f"{line['measured_s']:.3f}", f"{line['error']:+.1%}"]
        cells += [f"{line['tokens_per_s']:.0f}", f"{max(row['peak_vram_allocated_gib']):.1f}"]
        found.append(f"| {' | '.join(cells)} | {row['peak_host_gib']:.1f} |")
    return found


def checkpointing_lines() -> list[str]:
    found = []
    for name, shapes in SHAPES.items():
        for shape, label in shapes.items():
            mine = [row for row in rows(name) if row["shape"] == shape and not row["warmup"]]
            assert all(sum(row["mode"] == mode for row in mine) == 5 for mode in ("gpu", "cpu", "seed"))

            def of(mode: str, key: str, mine: list[dict[str, Any]] = mine) -> float:
                return statistics.median(row[key] for row in mine if row["mode"] == mode)

            base = of("gpu", "total_s")
            cpu, seed = (f"{of(mode, 'total_s') / base:.3f}" for mode in ("cpu", "seed"))
            saved = (of("gpu", "peak_bytes") - of("cpu", "peak_bytes")) / mine[0]["layer_input_bytes"]
            first = label == "3B, 32768"
            cells = [label, f"{base:.3f} s", cpu + " of that" * first, seed]
            cells.append(f"{saved:.0f} of {mine[0]['layers']}" + " layer inputs" * first)
            found.append("| " + " | ".join(cells) + " |")
    return found


def placement_lines() -> list[str]:
    figures = script("placement").figures
    both = []
    for pinning in ("exact", "torch"):
        mine = [row for row in rows("placement-llama3_3b-32k-h200") if row["cfg.memory.pinning"] == pinning]
        assert len(mine) == 2
        found = [figures(row) | {"predicted": row["predicted_host_gib"]} for row in mine]
        both.append({key: statistics.median(one[key] for one in found) for key in found[0]})

    def line(label: str, key: str, digits: int) -> str:
        return f"| {label} | " + " | ".join(f"{one[key]:.{digits}f}" for one in both) + " |"

    return [
        line("peak host memory, GiB", "peak host, GiB", 1),
        line("the same, predicted before the start", "predicted", 1),
        line("peak over what roles and layer inputs need", "peak / needed", 3),
        line("start of the interpreter to the end of the first update, s", "start to first update, s", 1),
        line("one update, s", "step, s", 2),
    ]


def attention_lines() -> list[str]:
    found = []
    for kind in ("sdpa_cudnn", "sdpa", "flash_attention_2"):
        mine = [
            row
            for row in rows("attention-h200")
            if (row["kind"], row["tokens"], row["kv_heads"]) == (kind, 32768, 32) and row["round"]
        ]
        product = 2e-12 * 32768**2 * mine[0]["heads"] * mine[0]["head_dim"] / 2  # the causal half of one product
        rates = [
            products * product * 1e3 / statistics.median(row[key] for row in mine)
            for products, key in ((2, "forward_ms"), (5, "backward_ms"))
        ]
        found.append(f"| {rates[0]:.0f} | {rates[1]:.0f} |")
    return found


def host_memory_lines() -> list[str]:
    samples = [*rows("host_memory-h200-8-16-32gib"), *rows("host_memory-h200-32gib")]
    found = []
    for way, label in WAYS.items():
        cells = [label]
        for gib in (8, 16, 32):
            mine = [row for row in samples if row["way"] == way and row["gib"] == gib]
            assert len(mine) == 2
            allocate, release = (statistics.median(row[key] for row in mine) for key in ("allocate_s", "release_s"))
            cells.append(f"{allocate:.{2 if allocate < 10 else 1}f}, {release:.2f}")
        copies = [
            statistics.median(x for row in samples if (row["way"], row["gib"]) == (way, 8) for x in values(row[key]))
            for key in ("h2d_gb_per_s", "d2h_gb_per_s")
        ]
        cells.append(f"{copies[0]:.1f} / {copies[1]:.1f} GB/s")
        found.append("| " + " | ".join(cells) + " |")
    clears = json.loads(samples[0]["environment_json"])["page_clear_gb_per_s"]
    limits = " | ".join(f"{gib * 2**30 / 1e9 / clears:.2f}" for gib in (8, 16, 32))
    return [*found, f"| limit | {limits} | |"]


def contention_lines() -> list[str]:
    """One line for what runs beside: the update's rate by threads, then that of the copies beside all cores and alone."""
    samples = by([row for row in rows("contention-h200") if row["round"]], "beside", "threads")

    def of(beside: str, threads: int, column: str) -> float:
        return statistics.median(row[column] for row in samples[beside, threads])

    found = []
    for beside in dict.fromkeys(beside for beside, _ in samples):
        cells = [f"{of(beside, threads, 'update_gb_per_s'):.0f}" for threads in (16, 15, 12, 8)]
        for way, column in (("h2d", "h2d_gb_per_s"), ("d2h", "d2h_gb_per_s"), ("kernels", "kernels_tflop_per_s")):
            there = way in beside.split("+")
            cells.append(f"{of(beside, 16, column):.0f} / {of(beside, 0, column):.0f}" if there else "-")
        found.append(f"| {' | '.join(cells)} |")
    return found


def by(samples: list[dict[str, Any]], *columns: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in samples:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def estimate_lines() -> list[str]:
    found = []
    for row in rows("peer_estimates"):
        who = "" if row["contender"] == "ldft" else f", {row['contender']}"
        ours = f"{row['ldft_host_gib']:.1f} / {row['ldft_vram_gib']:.1f}" if row["ldft_host_gib"] else "-"
        peaks = f"{row['measured_host_gib']:.1f} / {row['measured_vram_gib']:.1f}"
        peers = f"{row['accelerate_gib']:.1f} | {row['deepspeed_host_gib']:.1f} / {row['deepspeed_vram_gib']:.1f}"
        found.append(f"| {row['model']}, {row['tokens']} tokens{who} | {peaks} | {ours} | {peers} |")
    return found


@cache
def expected() -> tuple[str, ...]:
    """The measured part of every line of every table, from the rows."""
    found = [training_line(row, digits, each) for name, digits, each in TRAINING for row in rows(name)]
    found += [*checkpointing_lines(), *placement_lines(), *attention_lines(), *host_memory_lines(), *estimate_lines()]
    found += [*contention_lines(), *turns_lines(), *plan_lines()]
    found += evidence.speeds(load(publish.DATA)).splitlines()[2:]
    return tuple(found)
