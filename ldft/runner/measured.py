"""The measured columns of a row, from what the ranks reported before they ended."""

from __future__ import annotations

import math
import statistics
from typing import Any

from ldft.config import Config
from ldft.results.schema import MEASURED
from ldft.runner.launch import RankExit


def tokens_per_iteration(config: Config) -> int:
    """Tokens of one update, over all ranks and accumulation steps."""
    train = config.train
    sequences = train.micro_batch_size * train.gradient_accumulation_steps * config.launch.num_ranks
    return sequences * config.seq_len.tokens


def from_ranks(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns that ranks fill, as the schema says how. What a rank did not reach is left out.

    reports: the ranks' last partial results, by rank.
    """
    first = reports[0] | reports[0].get("init", {})
    row: dict[str, Any] = {}
    for column in MEASURED:
        name = column.name
        if column.source == "first" and name in first:
            row[name] = first[name]
        elif column.source in ("sum", "each") and all(name in report for report in reports):
            values = [report[name] for report in reports]
            row[name] = sum(values) if column.source == "sum" else values
    return row


def columns(config: Config, exits: list[RankExit], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The measured columns, from what the ranks reported before they ended (all of it, when they ended well)."""
    first = reports[0]
    row = from_ranks(reports)
    row["peak_rss_gib"] = [ended.peak_rss_gib for ended in sorted(exits, key=lambda ended: ended.rank)]
    counted = first.get("iteration_s", [])[config.train.warmup_iterations :]
    if counted:
        median_s = statistics.median(counted)
        row["iteration_median_s"] = median_s
        row["tokens_per_s"] = tokens_per_iteration(config) / median_s
        tflop = (first["model_tflop_dense"] + first["model_tflop_attention"]) / config.launch.num_ranks
        row["model_tflops_per_s"] = tflop / median_s
        if first.get("peak_tflops_per_s"):
            row["mfu"] = row["model_tflops_per_s"] / first["peak_tflops_per_s"]
    return row


def warnings(row: dict[str, Any]) -> list[str]:
    """What to say where the loss became NaN or infinite, and where iterations that count are too short for want of an update:
    DeepSpeed leaves it out where fp16 overflows and, in any precision, where the norm of the gradients is no number."""
    found = []
    for iteration, loss in enumerate(row.get("loss") or [], 1):
        if not math.isfinite(loss):
            found.append(
                f"the loss is {loss} in iteration {iteration}: it diverged; use a smaller optimizer.learning_rate"
            )
            break
    counted = (row.get("skipped_updates") or [])[row["warmup_iterations"] :]
    if skipped := sum(map(bool, counted)):
        remedy = "" if found else "; use more train.warmup_iterations, or a smaller train.loss_scale"
        found.append(
            f"{skipped} of {len(counted)} iterations after warm-up made no update, as gradients overflowed: they are too "
            f"short{remedy}"
        )
    return found
