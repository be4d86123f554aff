"""The measured columns of a row, from the ranks' reports."""

from __future__ import annotations

import math
import statistics
from typing import Any

from ldft.config import Config
from ldft.results.schema import MEASURED
from ldft.runner.launch import RankExit
from ldft.terminal import plural


def tokens_per_iteration(config: Config) -> int:
    """Tokens of one update, over all ranks and accumulation steps."""
    return config.sequences_per_update * config.seq_len.tokens


def from_ranks(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns that ranks provide, combined as the schema says. Values that a rank did not reach are left out.

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
    """The measured columns, from the ranks' last reports (complete if the ranks succeeded)."""
    first = reports[0]
    row = from_ranks(reports)
    row["peak_rss_gib"] = [ended.peak_rss_gib for ended in sorted(exits, key=lambda ended: ended.rank)]
    counted = first.get("iteration_s", [])[config.train.warmup_iterations :]
    if counted:
        median_s = statistics.median(counted)
        row["iteration_median_s"] = median_s
        row["tokens_per_s"] = tokens_per_iteration(config) / median_s
        if first["model_tflop_dense"] is not None:
            tflop = (first["model_tflop_dense"] + first["model_tflop_attention"]) / config.launch.num_ranks
            row["model_tflops_per_s"] = tflop / median_s
            if first.get("peak_tflops_per_s"):
                row["mfu"] = row["model_tflops_per_s"] / first["peak_tflops_per_s"]
    return row


def warnings(row: dict[str, Any]) -> list[str]:
    """Warnings if the loss became NaN or infinite, and if measured iterations are too short because an update was skipped:
    DeepSpeed skips it if fp16 overflows and, in any precision, if the gradient norm is not finite."""
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
            f"{skipped} of {plural(len(counted), 'iteration')} after warm-up made no update because gradients overflowed: they are "
            f"too short{remedy}"
        )
    return found


def notes(row: dict[str, Any], reports: list[dict[str, Any]]) -> list[str]:
    """Notes on model FLOPs that are null because they are not known, and on documents and sequences that were left out."""
    found = []
    if unknown := reports[0].get("model_tflop_unknown"):
        found.append(f"model_tflop_dense and what follows from it are null: ldft cannot count {unknown}")
    if skipped := row.get("documents_skipped"):
        found.append(f"data.path: {skipped} of {plural(row['documents_read'], 'document')} left out: null or empty")
    if skipped := row.get("sequences_skipped"):
        found.append(f"data.loss=assistant: {plural(skipped, 'sequence')} without a token of the assistant left out")
    return found
