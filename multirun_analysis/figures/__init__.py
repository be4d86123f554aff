"""The figures. Each function takes loaded rows and returns a matplotlib Figure, or a sentence that says why there is none."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from multirun_analysis import style
from multirun_analysis.figures.memory import (
    memory_by_node,
    memory_by_role,
    peak_memory,
    placement,
    predicted,
)
from multirun_analysis.figures.speed import choose_by, phases, speedup, throughput

FIGURES = {
    "throughput": throughput,
    "phases": phases,
    "speedup": speedup,
    "peak_memory": peak_memory,
    "memory_by_node": memory_by_node,
    "memory_by_role": memory_by_role,
    "placement": placement,
    "predicted": predicted,
}

__all__ = [
    "FIGURES",
    "choose_by",
    "memory_by_node",
    "memory_by_role",
    "peak_memory",
    "phases",
    "placement",
    "predicted",
    "speedup",
    "throughput",
    "write_all",
]


def write_all(
    df: pd.DataFrame, folder: Path, *, by: str | None = None, baseline: str | None = None
) -> tuple[list[Path], dict[str, str]]:
    """Draw every figure that the rows allow as PNG and SVG; `by` and `baseline` are those of the speed-up.

    Returns the files, and why each other figure is missing.
    """
    written: list[Path] = []
    missing: dict[str, str] = {}
    for name, draw in FIGURES.items():
        figure = speedup(df, by, baseline) if name == "speedup" else draw(df)
        if isinstance(figure, Figure):
            written += style.save(figure, folder, name)
        else:
            missing[name] = figure
    return written, missing
