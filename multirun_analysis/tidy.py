"""Tidy tables from loaded rows: cells, phases, memory by node and by role, placement, predictions, Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ldft.errors import ResultsError
from multirun_analysis.rows import live

# The columns that define a cell: everything that was chosen, and the machine. In the order of tables and figures.
CELL = ["machine", "model", "seq_len_tokens", "policy", "variant"]

# Column of each prediction -> column of the measured value.
PREDICTIONS = {"predicted_host_gib": "peak_host_gib", "predicted_vram_gib": "peak_vram_gib"}

_PHASES = ("forward", "backward", "step")
# Of the fused step's update, which may run beside the next iteration's forward pass.
_UPDATE = ("update_s", "update_wait_s")


def cells(df: pd.DataFrame) -> pd.DataFrame:
    """One line per cell (rows that differ only in repeat, seed, iterations or time limit are runs of one cell).

    runs, failed_runs            ok and failed attempts; neither counts superseded failures or rows apart
    status, failure              ok if any run is ok; `failure` is empty, a label, or `OOM 1/3` when one run of three failed
    tokens_per_s                 median over runs of each run's tokens_per_s
    tokens_per_s_p10, _p90       10% and 90% quantile of the throughput of all iterations after warm-up
    iteration_s, forward_s, ...  medians over runs of the medians after warm-up; other_s is the time outside all phases
    update_s, update_wait_s      the same: how long the fused step's update ran, and how much of that training waited for it
    overlap_step                 whether the update ran beside the next forward pass; else it is a part of step_s
    peak_host_gib, peak_vram_gib largest of any run
    gpu_hours_per_billion_tokens median over runs
    """
    columns = [
        *CELL,
        "runs",
        "failed_runs",
        "status",
        "failure",
        "samples",
        "tokens_per_s",
        "tokens_per_s_p10",
        "tokens_per_s_p90",
        "iteration_s",
        *(f"{phase}_s" for phase in _PHASES),
        "other_s",
        *_UPDATE,
        "overlap_step",
        "peak_host_gib",
        "peak_vram_gib",
        "mfu",
        "gpu_hours_per_billion_tokens",
        "error_message",
        "log_path",
    ]
    needed = [*CELL, "ok", "status", "failure", "sample_tokens_per_s", "tokens_per_s", "iteration_median_s", "mfu"]
    needed += [
        *(f"{phase}_median_s" for phase in (*_PHASES, "update", "update_wait")),
        "overlap_step",
        "peak_host_gib",
        "peak_vram_gib",
        "gpu_hours_per_billion_tokens",
        "error_message",
        "log_path",
    ]
    # Drop lengths below 1, for which rows were refused: they cannot be drawn on an axis.
    kept = live(df).loc[df["seq_len_tokens"] > 0, needed]
    found = [_cell(dict(zip(CELL, key, strict=True)), part) for key, part in kept.groupby(CELL, sort=True)]
    return pd.DataFrame(found, columns=columns)


def _cell(cell: dict[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    ok, failed = rows[rows["ok"]], rows[~rows["ok"]]
    failure = ""
    if len(failed):
        failure = str(failed["failure"].iloc[-1])
        if len(ok):
            failure += f" {len(failed)}/{len(rows)}"
    samples = np.concatenate([np.empty(0), *ok["sample_tokens_per_s"]])
    low, high = np.quantile(samples, [0.1, 0.9]) if len(samples) else (np.nan, np.nan)
    iteration_s = ok["iteration_median_s"].median()
    phases_s = {f"{phase}_s": ok[f"{phase}_median_s"].median() for phase in _PHASES}
    last = failed.iloc[-1] if len(failed) else None
    return cell | {
        "runs": len(ok),
        "failed_runs": len(failed),
        "status": "ok" if len(ok) else str(failed["status"].iloc[-1]),
        "failure": failure,
        "samples": len(samples),
        "tokens_per_s": ok["tokens_per_s"].median(),
        "tokens_per_s_p10": low,
        "tokens_per_s_p90": high,
        "iteration_s": iteration_s,
        **phases_s,
        "other_s": iteration_s - sum(phases_s.values()),
        **{name: ok[f"{name.removesuffix('_s')}_median_s"].median() for name in _UPDATE},
        "overlap_step": bool(ok["overlap_step"].eq(True).any()),
        "peak_host_gib": ok["peak_host_gib"].max(),
        "peak_vram_gib": ok["peak_vram_gib"].max(),
        "mfu": ok["mfu"].median(),
        "gpu_hours_per_billion_tokens": ok["gpu_hours_per_billion_tokens"].median(),
        "error_message": None if last is None else last.error_message,
        "log_path": None if last is None else last.log_path,
    }


def phases(df: pd.DataFrame) -> pd.DataFrame:
    """Seconds of an iteration by phase, one line per cell and phase (forward, backward, step, other), ok cells only.

    `share` is the phase's fraction of the iteration. Medians of phases need not sum to the median iteration: `other` is the rest,
    and may be slightly negative.
    """
    wide = cells(df)
    wide = wide[wide["status"] == "ok"]
    names = [f"{phase}_s" for phase in (*_PHASES, "other")]
    long = wide.melt([*CELL, "iteration_s"], names, "phase", "seconds")
    long["phase"] = long["phase"].str.removesuffix("_s")
    long["share"] = long["seconds"] / long["iteration_s"]
    return long.sort_values(CELL, kind="stable", ignore_index=True)


def _entries(df: pd.DataFrame, column: str, fields: Sequence[str]) -> pd.DataFrame:
    """The entries of a list<struct> column of ok rows, one line each, with the row's cell and run. A missing column gives no
    lines."""
    head = [*CELL, "run_id", "attempt"]
    found: list[dict[str, Any]] = []
    if column in df.columns:
        for _, row in df[df["ok"]].iterrows():
            entries = row[column]
            for entry in entries if isinstance(entries, np.ndarray | list) else []:
                found.append({name: row[name] for name in head} | {name: entry.get(name) for name in fields})
    return pd.DataFrame(found, columns=[*head, *fields])


def memory_by_node(df: pd.DataFrame) -> pd.DataFrame:
    """Resident GiB by NUMA node after the last iteration, one line per run, host and node; ok runs with this data only."""
    kinds = ("huge_gib", "heap_gib", "stack_gib", "private_gib", "total_gib")
    return _entries(df, "nodes", ("host", "node", *kinds))


def _role_entries(df: pd.DataFrame) -> pd.DataFrame:
    return _entries(df, "roles", ("host", "rank", "role", "bytes", "node", "share", "requested_share"))


def memory_by_role(df: pd.DataFrame) -> pd.DataFrame:
    """GiB of each tensor role on each node, one line per run, host, role and node, summed over ranks.

    In the column `roles`, `bytes` is the role's size on its rank and `share` the fraction of it on the node. If the kernel forbade
    the query, there is no share and no line.
    """
    entries = _role_entries(df).dropna(subset=["share"])
    entries["gib"] = entries["bytes"].astype(float) * entries["share"].astype(float) / 2**30
    keys = [*CELL, "run_id", "attempt", "host", "role", "node"]
    return entries.groupby(keys, as_index=False, sort=False)["gib"].sum()


def placement(df: pd.DataFrame) -> pd.DataFrame:
    """Requested and actual share, one line per run, rank, role and node, with their difference.

    A policy for the whole process has one line per node, with the role `process`; nodes without a requested share have none.
    """
    process = _entries(df, "numa_shares", ("host", "node", "added_gib", "share", "requested_share"))
    total = process.groupby(["run_id", "attempt", "host"])["added_gib"].transform("sum").astype(float)
    process = process.assign(role="process", rank=0, bytes=total * 2**30).drop(columns="added_gib")
    roles = _role_entries(df)
    entries = pd.concat([part for part in (process, roles) if len(part)] or [roles], ignore_index=True)
    entries = entries.dropna(subset=["requested_share", "share"]).reset_index(drop=True)
    entries["share"] = entries["share"].astype(float)
    entries["requested_share"] = entries["requested_share"].astype(float)
    entries["difference"] = entries["share"] - entries["requested_share"]
    return entries


def predicted(df: pd.DataFrame) -> pd.DataFrame:
    """Predicted and measured memory, one line per ok run and quantity, with `ratio` = predicted / measured."""
    parts = []
    for prediction, measurement in PREDICTIONS.items():
        if prediction not in df.columns:
            continue
        part = df.loc[df["ok"], [*CELL, "run_id", "attempt", prediction, measurement]]
        part = part.rename(columns={prediction: "predicted_gib", measurement: "measured_gib"})
        part = part.assign(quantity=measurement.removeprefix("peak_").removesuffix("_gib"))
        parts.append(part.dropna(subset=["predicted_gib", "measured_gib"]))
    if not parts:
        empty = [*CELL, "run_id", "attempt", "predicted_gib", "measured_gib", "quantity", "ratio"]
        return pd.DataFrame(columns=empty)
    found = pd.concat(parts, ignore_index=True)
    return found.assign(ratio=found["predicted_gib"] / found["measured_gib"])


def predicted_times(df: pd.DataFrame) -> pd.DataFrame:
    """Predicted and measured seconds, one line per ok run and quantity (iteration, forward, backward, step), with `ratio`."""
    parts = []
    for quantity in ("iteration", *_PHASES):
        prediction, measurement = f"predicted_{quantity}_s", f"{quantity}_median_s"
        if prediction in df.columns:
            part = df.loc[df["ok"], [*CELL, "run_id", "attempt", prediction, measurement]]
            part = part.rename(columns={prediction: "predicted_s", measurement: "measured_s"})
            parts.append(part.assign(quantity=quantity).dropna(subset=["predicted_s", "measured_s"]))
    if not parts:
        return pd.DataFrame(columns=[*CELL, "run_id", "attempt", "predicted_s", "measured_s", "quantity", "ratio"])
    found = pd.concat(parts, ignore_index=True)
    return found.assign(ratio=found["predicted_s"] / found["measured_s"])


def larger_is_better(column: str) -> bool:
    """Whether larger is better: True for throughput, utilisation and lengths, False for seconds and bytes."""
    return column.endswith(("_per_s", "mfu", "tokens", "speedup"))


def pareto(
    df: pd.DataFrame, x: str, y: str, within: Sequence[str] = ("machine", "model", "seq_len_tokens")
) -> pd.DataFrame:
    """The Pareto front: cells that no other cell of the same group beats in one of `x`, `y` without losing in the other.

    df: rows (reduced to cells first) or cells. Columns in tokens/s, mfu and tokens are better when larger, all others (seconds,
    GiB) when smaller. Cells that lack either value are left out; of equal cells, all stay.
    Raises ResultsError if a column does not exist.
    """
    table = cells(df) if "superseded" in df.columns else df
    for name in (x, y, *within):
        if name not in table.columns:
            raise ResultsError(f"no column '{name}' to compare; use one of {', '.join(table.columns)}")
    table = table.dropna(subset=[x, y])
    cost = pd.DataFrame({name: -table[name] if larger_is_better(name) else table[name] for name in (x, y)})
    kept: list[Any] = []
    groups = [part for _, part in table.groupby(list(within), sort=True)] if within else [table]
    for group in groups:
        best = np.inf
        ordered = cost.loc[group.index].sort_values([x, y], kind="stable")
        for _, same_x in ordered.groupby(x, sort=True):
            least = same_x[y].min()
            if least < best:
                kept.extend(same_x.index[same_x[y] == least])
                best = least
    return table.loc[kept].reset_index(drop=True)
