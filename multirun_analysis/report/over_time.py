"""Memory over time, from the traces beside the rows, in as few points as a small figure shows."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ldft.errors import ResultsError
from multirun_analysis import traces

# Reading a trace takes a few hundredths of a second, and the page has to be there in seconds.
MOST_TRACES = 60
_MOST_POINTS = 120


def of_cells(df: pd.DataFrame) -> dict[tuple[str, int], dict[str, Any]]:
    """(run_id, attempt) -> `seconds`, `nodes` (GiB of the ranks by node), `vram` (seconds and GiB used on the fullest GPU).

    Of the runs with the most host memory, at most MOST_TRACES. A trace that cannot be read has the reason as `problem`.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for _, row in traces.traced(df).head(MOST_TRACES).iterrows():
        try:
            found[row["run_id"], row["attempt"]] = _points(traces.read(row))
        except ResultsError as error:
            found[row["run_id"], row["attempt"]] = {"problem": str(error)}
    return found


def _points(trace: pd.DataFrame) -> dict[str, Any]:
    nodes = _thinned(traces.memory_by_node(trace))
    devices = traces.devices(trace)
    vram = devices.groupby("elapsed_s")["vram_used_gib"].max().to_frame() if len(devices) else pd.DataFrame()
    vram = _thinned(vram)
    return {
        "seconds": _rounded(nodes.index),
        "nodes": [[f"node {node}", _rounded(nodes[node])] for node in nodes],
        "vram": [_rounded(vram.index), _rounded(vram["vram_used_gib"])] if len(vram) else None,
    }


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """At most _MOST_POINTS lines, each the largest values of those that it stands for: a short peak is what matters."""
    step = -(-len(table) // _MOST_POINTS)
    if step <= 1:
        return table
    group = pd.Series(range(len(table)), index=table.index) // step
    thinned = table.groupby(group.to_numpy()).max()
    thinned.index = table.index[::step]
    return thinned


def _rounded(values: Any) -> list[float | None]:
    return [None if pd.isna(value) else float(f"{value:.4g}") for value in values]
