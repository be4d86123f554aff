"""Every figure in docs/benchmarks.md is recomputed here from the committed rows that the page links to."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

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
    ("share-llama3_1b-16k-h200", 3, False),
    ("share-llama3_1b-8k-h200", 3, False),
    ("keep_attention-llama3_3b-32k-h200", 3, False),
    ("share-llama3_8b-32k-h200", 3, False),
    ("peers-llama3_3b-32k-h200", 3, False),
    ("training-llama3_8b-32k-2gpus-h100", 3, True),
    ("scaling-llama3_3b-32k-h100", 3, True),
    ("long_sequences-131072-llama3_3b-h200", 1, False),
    ("long_sequences-llama3_3b-h200", 1, False),
    ("long_sequences-plans-h200", 1, False),
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
    found += evidence.speeds(load(publish.DATA)).splitlines()[2:]
    return tuple(found)


def test_every_measurement_has_its_line() -> None:
    assert len(expected()) > 25
    assert [line for line in expected() if line not in PAGE] == []


def test_every_line_of_a_table_was_measured() -> None:
    tables = LINES[: LINES.index("## Run them yourself")]
    measured = [line for line in tables if re.match(r"\|.*\d", line) and "GiB |" not in line]
    assert len(measured) > 25
    assert [line for line in measured if not any(line.endswith(part) for part in expected())] == []


def test_readme_repeats_lines_of_the_page() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    section = readme[readme.index("## Measured") : readme.index("## Limits")].splitlines()
    repeated = [line for line in section if re.match(r"\|.*\d", line)]
    assert len(repeated) == 4 and set(repeated) <= set(LINES)
    (ratio,) = re.findall(r"a ratio of [\d.]+\d", " ".join(section))
    assert ratio in PAGE


def test_cost_of_the_tool() -> None:
    rates = {}
    for who in ("ldft", "plain"):
        mine = [row for row in rows("against_plain-llama3_1b-8k-h200") if row["who"] == who]
        samples = [sample for row in mine for sample in counted(row, "iteration_s")]
        assert len(samples) == 21
        rates[who] = mine[0]["tokens_per_iteration"] / statistics.median(samples)
    ratio = f"a ratio of {rates['ldft'] / rates['plain']:.3f}"
    assert f"{rates['ldft']:.0f} tokens/s, the plain script {rates['plain']:.0f}: {ratio}" in PAGE


def test_cost_of_the_trace() -> None:
    for where, count, said in (("in-gpu", 58, "In GPU memory"), ("offload", 20, "With full offload")):
        times: dict[int, dict[float, float]] = {}
        for row in rows(f"monitor-llama3_1b-8k-{where}-h100"):
            assert len(counted(row, "iteration_s")) == count
            times.setdefault(row["round"], {})[row["interval_s"]] = median(row, "iteration_s")
        ratios = [both[0.0] / both[1.0] for both in times.values() if len(both) == 2]
        assert f"{said}, {count} iterations a run: {', '.join(f'{ratio:.3f}' for ratio in ratios)}." in PAGE
        if where == "in-gpu":
            assert f"The median is {statistics.median(ratios):.4f}: no cost" in PAGE


def test_arithmetic_limit() -> None:
    row = rows("training-llama3_3b-32k-offload-h200")[0]
    tflop_per_token = (row["model_tflop_dense"] + row["model_tflop_attention"]) / row["tokens_per_iteration"]
    limit = 989 / tflop_per_token
    # Recomputing every layer adds a third of the work: forward is one part of three.
    assert f"is {limit:.0f} tokens/s, or {limit * 3 / 4:.0f} with every layer recomputed" in PAGE


def test_the_update_at_short_lengths() -> None:
    offloaded = next(row for row in rows("share-llama3_3b-8k-h200") if row["contender"] == "ours-offload-no-share")
    assert f"the CPU's update, which takes {median(offloaded, 'update_s'):.2f} s" in PAGE


def test_two_gpus_against_one() -> None:
    alone, together = (rate(row) for row in rows("scaling-llama3_3b-32k-h100"))
    assert f"two reach {together / 2 / alone:.3f} of it each" in PAGE


def test_a_matrix_product_and_the_losses() -> None:
    assert f"reaches {rows('attention-h200')[0]['matmul_tflops_per_s']:.0f} TFLOP/s" in PAGE
    for name, text in (("loss_curves-llama3_1b-4k-h200", "4.1e-3"), ("loss_curves-llama3_1b-4k-1e-4-h200", "1.9e-2")):
        found = rows(name)
        assert all(len(values(row["loss"])) == 20 for row in found) and len(found) == 8
        furthest = max(row["furthest_relative"] for row in found)
        assert f"{furthest:.1e}".replace("e-0", "e-") == text and f"relative {text}" in PAGE


def test_fp16_made_every_update() -> None:
    (row,) = rows("fp16-llama3_1b-2k-offload-h200")
    assert not any(row["skipped_updates"]) and row["config_json"].count('"precision": "fp16"') == 1
    assert f"none of {len(row['skipped_updates'])} updates was skipped" in PAGE


def test_adapters() -> None:
    (row,) = rows("lora-llama3_8b-8k-h200")
    memory = (
        f"{max(row['peak_vram_allocated_gib']):.1f} GiB of GPU memory, {row['peak_host_gib']:.1f} GiB of host memory"
    )
    times = f"The update takes {median(row, 'step_s'):.2f} s of {median(row, 'iteration_s'):.2f} s per iteration"
    assert f"{memory}, {rate(row):.0f} tokens/s. {times}" in PAGE


def test_estimates_of_other_tools_are_beside_the_peaks_of_their_rows() -> None:
    for row in rows("peer_estimates"):
        peaks = {
            round(one["peak_host_gib"], 6) for one in pq.read_table(RESULTS / f"{row['rows']}.parquet").to_pylist()
        }
        assert round(row["measured_host_gib"], 6) in peaks


def test_rates_of_the_node() -> None:
    found = {row["kernel"]: row["gb_per_s"] for row in rows("nodes-h200")}
    copies = f"copies at {found['h2d']:.1f} GB/s to the GPU and {found['d2h']:.1f} GB/s from it"
    assert f"{copies}, AdamW at {found['adam']:.0f} GB/s" in PAGE


def test_bf16_on_a_cpu() -> None:
    found = rows("cpu_precision-xeon_amx-1core")
    assert {row["num_cores"] for row in found} == {1}

    kinds: dict[tuple[str, str], list[float]] = {}
    for row in found:
        kinds.setdefault((row["onednn_max_cpu_isa"], row["dtype"]), []).extend(row["seconds"])
    assert {len(samples) for samples in kinds.values()} == {15}

    def ratio(limit: str) -> float:
        return statistics.median(kinds[limit, "bfloat16"]) / statistics.median(kinds[limit, "float32"])

    without = (
        f"With AVX2 alone bf16 takes {ratio('AVX2'):.0f} times as long, with AVX-512 {ratio('AVX512_CORE'):.1f} times"
    )
    instructions = (
        f"with its bf16 instructions {ratio('AVX512_CORE_BF16'):.1f} times, and with AMX {ratio('ALL'):.2f} times"
    )
    assert f"{without}, {instructions}." in PAGE
    spread = max(max(samples) / min(samples) for samples in kinds.values())
    assert f"samples of one kind differ by up to a factor of {spread:.1f}." in PAGE


def test_both_samples_of_the_largest_allocation() -> None:
    samples = [*rows("host_memory-h200-8-16-32gib"), *rows("host_memory-h200-32gib")]
    low, high = sorted(row["allocate_s"] for row in samples if (row["way"], row["gib"]) == ("ours", 32))
    assert f"ldft's were {low:.2f} and {high:.2f} s" in PAGE


def test_rounding_of_allocators() -> None:
    memory = script("host_memory")
    ratios = [memory.reserved_over_needed(shape) for shape in memory.SHAPES.values()]
    torch = [ratio["torch"] for ratio in ratios]
    assert f"{min(torch):.2f} to {max(torch):.2f} times the bytes needed for the weights of seven models" in PAGE
    assert len(ratios) == 7 and max(ratio["ours"] for ratio in ratios) <= 1.0001


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*-h[12]00*.parquet")))
def test_no_committed_row_is_forgotten(name: str) -> None:
    # This one is there for the estimate, which takes a constant from it.
    assert f"{name}.parquet" in PAGE or name == "fp16-llama3_1b-2k-h200"
