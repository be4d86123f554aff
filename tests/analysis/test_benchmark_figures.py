"""Every figure in docs/benchmarks.md is recomputed here from the committed rows that the page links to."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from multirun_analysis import publish
from tests.analysis.benchmark_lines import (
    LINES,
    PAGE,
    REPOSITORY,
    RESULTS,
    by,
    counted,
    expected,
    median,
    rate,
    rows,
    script,
    values,
)


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
    took, kept = [], []
    for name in ("share", "overlap", "overlap-32cores", "overlap-16cores"):
        kind, _, cores = name.partition("-")
        mine = rows("-".join(word for word in (kind, "llama3_3b-8k", cores, "h200") if word))

        def of(contender: str, column: str, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.median(
                sample for row in mine if row["contender"] == contender for sample in counted(row, column)
            )

        took.append(f"{of('ours-offload-no-share', 'update_s'):.2f}")
        kept.append(f"{of('plain-in-gpu', 'iteration_s') / of('ours-offload-no-share', 'iteration_s'):.3f}")
    for found, rest in ((took, "s on the four machines"), (kept, "of the tokens/s in GPU memory are left")):
        assert f"{', '.join(found[:-1])} and {found[-1]} {rest}" in PAGE


def test_plans_beat_rows_made_by_hand() -> None:
    plans = pd.read_parquet(RESULTS / "plans-h200.parquet")
    reached = {
        (row["cfg.model.name"], row["cfg.seq_len.tokens"]): line["tokens_per_s"]
        for cell, line in script("plans").regret(plans).set_index("cell").iterrows()
        for _, row in plans[plans["cell"] == cell].head(1).iterrows()
        if "vram_gib" not in str(cell)
    }
    compared = 0
    for table in (pq.read_table(file) for file in [*RESULTS.glob("*.parquet"), *publish.DATA.rglob("*.parquet")]):
        if not {"config_json", "iteration_s", "status"} <= set(table.column_names) or "setting" in table.column_names:
            continue
        for row in table.to_pylist():
            config = json.loads(row["config_json"])
            one = config["train"]["micro_batch_size"] * config["train"]["gradient_accumulation_steps"] == 1
            chosen = config.get("plan", {}).get("goal", "none") != "none" or "plan" in row.get("contender", "")
            key = config["model"]["name"], config["seq_len"]["tokens"]
            if row["status"] != "ok" or key not in reached or chosen or config["lora"]["rank"] or not one:
                continue
            if config["launch"]["num_ranks"] == 1 and counted(row, "iteration_s"):
                compared += 1
                assert config["seq_len"]["tokens"] / median(row, "iteration_s") < reached[key], (
                    key,
                    row["config_json"],
                )
    assert compared > 40


def test_plans_in_the_readme() -> None:
    table = script("plans").regret(pd.read_parquet(RESULTS / "plans-h200.parquet"))
    longer = 1 / (1 + table["error"]) - 1
    assert len(table) == 14
    text = f"fourteen plans took between {longer.max():.0%} longer and {-longer.min():.0%} less than expected"
    assert text in " ".join((REPOSITORY / "README.md").read_text().split())


def test_neighbours_of_plans() -> None:
    plans, seconds = pd.read_parquet(RESULTS / "plans-h200.parquet"), script("plans").seconds
    faster, spread = [], []
    for cell in dict.fromkeys(plans[plans["setting"] == "neighbour"]["cell"].iloc[::-1]):
        mine = plans[plans["cell"] == cell]
        own, others = (mine[mine["setting"] == setting] for setting in ("plan", "neighbour"))
        assert len(others) == 8
        best = min(seconds(others.iloc[[index]]) for index in range(8))
        faster.append(f"{seconds(own) / best - 1:.1%}")
        single = [seconds(own.iloc[[index]]) for index in range(len(own))]
        spread.append(f"{max(single) / min(single) - 1:.1%}")
    text = (
        f"the fastest was {' and '.join(faster)} faster than the plan, whose own runs differ by {' and '.join(spread)}."
    )
    assert text in PAGE


def test_the_update_beside_copies() -> None:
    table = {
        key: statistics.median(row["update_gb_per_s"] for row in samples)
        for key, samples in by([row for row in rows("contention-h200") if row["round"]], "beside", "threads").items()
        if key[1]
    }
    assert f"falls from {table['nothing', 16]:.0f} to {table['h2d+d2h', 16]:.0f} GB/s" in PAGE


def test_8b_on_two_gpus_with_the_update_beside() -> None:
    within, beside = sorted(rate(row) for row in rows("overlap-llama3_8b-32k-2gpus-h200"))
    assert f"{beside / within:.3f} times the tokens/s" in PAGE


def test_exchanges_of_two_gpus() -> None:
    profile = (RESULTS / "profile-shared-131072-llama3_3b-2gpus-h200.txt").read_text()
    works, exchanges, bare = (
        float(re.search(pattern, profile)[1])  # type: ignore[index]
        for pattern in (
            r"spans ([\d.]+) s",
            r"exchanges +busy +([\d.]+) s",
            r"without a kernel beside them: ([\d.]+) s",
        )
    )
    assert (
        f"take {exchanges} s of the {works} s that a GPU works in one iteration of 131072 tokens, {bare} s of them"
        in PAGE
    )
    assert f"could save {100 * bare / works:.0f}%" in PAGE


def test_one_sequence_on_two_gpus_against_deepspeeds_recipe() -> None:
    peer, mine = sorted(rate(row) for row in rows("scaling-shared-peer-131072-llama3_3b-h200"))
    assert f"ldft has {mine / peer:.2f} times the tokens/s of the script" in PAGE


def test_two_gpus_against_one() -> None:
    alone, together = (rate(row) for row in rows("scaling-llama3_3b-32k-h100"))
    assert f"two reach {together / 2 / alone:.3f} of it each" in PAGE


def test_one_sequence_on_two_gpus_against_one() -> None:
    alone, together = (rate(row) for row in rows("scaling-shared-131072-llama3_3b-2gpus-h200"))
    assert f"two GPUs have {together / alone:.3f} times the tokens/s of one" in PAGE
    assert f"two have {together / alone:.3f} times" in (REPOSITORY / "docs" / "sequence_parallel.md").read_text()
    losses = {}
    for row in rows("losses-shared-3b-8b-2gpus-h200"):
        assert len(row["loss"]) == 20
        losses[json.loads(row["config_json"])["model"]["name"], row["ranks"]] = row["loss"]

    def apart(model: str) -> list[tuple[float, float]]:
        return [(a, abs(b - a)) for a, b in zip(losses[model, 1], losses[model, 2], strict=True)]

    def power(number: float) -> str:
        return f"{number:.1e}".replace("e-0", "e-")

    small = power(max(d for a, d in apart("llama3_8b") if a < 1))
    large = power(max(d / a for a, d in apart("llama3_8b") if a > 1))
    assert f"a relative {power(max(d / a for a, d in apart('llama3_3b')))} (3B" in PAGE
    assert f"an absolute {small} where they are below 1, {large} of them where they are above (8B" in PAGE


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
