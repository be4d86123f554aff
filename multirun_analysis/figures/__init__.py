"""The figures. Each function takes loaded rows and returns a matplotlib Figure, or a sentence that explains why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from multirun_analysis import style
from multirun_analysis.figures.memory import (
    memory_by_node,
    memory_by_role,
    peak_memory,
    placement,
)
from multirun_analysis.figures.over_time import devices_over_time, memory_over_time
from multirun_analysis.figures.predictions import predicted, predicted_times
from multirun_analysis.figures.speed import groups_to_compare, phases, speedup, throughput

FIGURES = {
    "throughput": throughput,
    "phases": phases,
    "speedup": speedup,
    "peak_memory": peak_memory,
    "memory_by_node": memory_by_node,
    "memory_by_role": memory_by_role,
    "placement": placement,
    "predicted": predicted,
    "predicted_times": predicted_times,
    "memory_over_time": memory_over_time,
    "devices_over_time": devices_over_time,
}

__all__ = [
    "FIGURES",
    "devices_over_time",
    "groups_to_compare",
    "memory_by_node",
    "memory_by_role",
    "memory_over_time",
    "peak_memory",
    "phases",
    "placement",
    "predicted",
    "predicted_times",
    "speedup",
    "throughput",
    "write_all",
]


def write_all(
    df: pd.DataFrame, folder: Path, *, groups: Sequence[str] = (), baseline: str | None = None
) -> tuple[list[Path], dict[str, str]]:
    """Draw every figure that the rows allow as PNG and SVG, and for each of `groups` the speed-up over its `baseline`.

    The first group's figure is `speedup`, the others are `speedup_<group>`. Returns the files, and why each missing figure is
    missing.
    """
    written: list[Path] = []
    missing: dict[str, str] = {}

    def write(name: str, figure: Figure | str) -> None:
        if isinstance(figure, Figure):
            written.extend(style.save(figure, folder, name))
        else:
            missing[name] = figure

    for name, draw in FIGURES.items():
        write(name, speedup(df, next(iter(groups), None), baseline) if name == "speedup" else draw(df))
    for group in groups[1:]:
        write(f"speedup_{group}", speedup(df, group, baseline))
    return written, missing
