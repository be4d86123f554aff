"""Analyse rows: load the rows of a results folder; compare, summarise and plot them.

    python -m multirun_analysis results/          tables on the terminal, figures in results/figures/
    python -m multirun_analysis report results/   one HTML file: results/report.html
    python -m multirun_analysis diff a/ b/        what changed between two folders

In Python or a notebook:

    from multirun_analysis import load, compare
    df = load("results")
    compare(df, by="numa", baseline="local_only")

ldft.results reads the rows; nothing here imports torch.
"""

from multirun_analysis import traces
from multirun_analysis.comparison import compare, diff
from multirun_analysis.rows import load
from multirun_analysis.tidy import (
    cells,
    memory_by_node,
    memory_by_role,
    pareto,
    phases,
    placement,
    predicted,
    predicted_times,
)

__all__ = [
    "cells",
    "compare",
    "diff",
    "load",
    "memory_by_node",
    "memory_by_role",
    "pareto",
    "phases",
    "placement",
    "predicted",
    "predicted_times",
    "traces",
]
