"""Traces of runs (trace.parquet beside a row) as tidy tables: host memory by node and by role, and devices, over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from ldft.errors import ResultsError
from ldft.results import intact


def traced(df: pd.DataFrame) -> pd.DataFrame:
    """The rows whose trace exists, those with the most host memory first."""
    return df[df["trace_file"].notna()].sort_values("peak_host_gib", ascending=False, kind="stable", na_position="last")


def read(row: pd.Series) -> pd.DataFrame:
    """A row's trace, one line per sample, with `elapsed_s` since the first. Raises ResultsError if it cannot be read."""
    path = Path(row["trace_file"])
    try:
        table = pq.read_table(path)
        intact.check(table, "time", "phase", "iteration", "memory", "memory_age_s", "roles", "devices")
    except intact.DAMAGE as error:
        raise ResultsError(f"cannot read {path}: {' '.join(str(error).split())}; run the cell again") from error
    frame: pd.DataFrame = table.to_pandas()
    return frame.assign(elapsed_s=(frame["time"] - frame["time"].iloc[0]).dt.total_seconds())


def _entries(trace: pd.DataFrame, column: str) -> pd.DataFrame:
    """The entries of a list column, one line each, with the sample's time, phase and iteration."""
    head = ("elapsed_s", "phase", "iteration")
    found: list[dict[str, Any]] = []
    for sample in trace.to_dict("records"):
        found += [{name: sample[name] for name in head} | entry for entry in sample[column]]
    return pd.DataFrame(
        found, columns=[*head, *dict.fromkeys(name for one in found for name in one if name not in head)]
    )


def _read_then(trace: pd.DataFrame) -> pd.DataFrame:
    """The samples with a memory reading (between readings, memory is unknown), and the last sample, which repeats the last
    reading."""
    known = trace[trace["memory"].map(len) > 0]
    return known[(known["memory_age_s"] == 0) | (known.index == known.index.max())]


def memory_by_node(trace: pd.DataFrame) -> pd.DataFrame:
    """GiB of the ranks' processes on each node, summed over ranks: one line per reading, one column per node; index elapsed_s."""
    entries = _entries(_read_then(trace), "memory")
    if entries.empty:
        return pd.DataFrame(index=pd.Index([], name="elapsed_s"))
    return entries.pivot_table(index="elapsed_s", columns="node", values="mib", aggfunc="sum", fill_value=0) / 1024


def memory_by_role(trace: pd.DataFrame) -> pd.DataFrame:
    """The same by role, over all nodes: one column per role, and `other` for the rest of the processes' memory."""
    readings = _read_then(trace)
    total = memory_by_node(trace).sum(axis=1)
    entries = _entries(readings, "roles")
    if entries.empty:
        return pd.DataFrame({"other": total})
    roles = entries.pivot_table(index="elapsed_s", columns="role", values="bytes", aggfunc="sum", fill_value=0) / 2**30
    roles = roles.reindex(total.index, fill_value=0.0)
    # Negative if memory is allocated between the ranks' reports and the reading of their memory.
    return roles.assign(other=(total - roles.sum(axis=1)).clip(lower=0))


def devices(trace: pd.DataFrame) -> pd.DataFrame:
    """GPUs, one line per sample and rank: vram_used_gib, vram_total_gib, utilisation_percent, PCIe rates in GB/s."""
    entries = _entries(trace, "devices")
    if entries.empty:
        return entries
    sizes = {f"vram_{name}_gib": entries[f"vram_{name}_mib"] / 1024 for name in ("used", "total")}
    rates = {f"pcie_{name}_gb_per_s": entries[f"pcie_{name}_mb_per_s"] / 1000 for name in ("rx", "tx")}
    head = entries[["elapsed_s", "phase", "iteration", "rank", "utilisation_percent"]]
    return head.assign(**sizes, **rates)


def phases(trace: pd.DataFrame) -> pd.DataFrame:
    """phase, begin_s, end_s: from the first sample of each phase to the first of the next."""
    first = trace.groupby("phase", sort=False)["elapsed_s"].first()
    ends = [*first.iloc[1:], trace["elapsed_s"].iloc[-1]]
    return pd.DataFrame({"phase": first.index, "begin_s": first.to_numpy(), "end_s": ends})
