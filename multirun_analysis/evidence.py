"""What the committed rows of a sweep say, as a table in the documentation: scripts/docs.py writes it, so each number is a row's."""

from __future__ import annotations

import math

import pandas as pd

from multirun_analysis import style, tidy

# Columns: heading -> variant of the cell.
_OPTIONS = {
    "in GPU memory": "offload=none checkpointing=gpu",
    "`offload=full`": "offload=full checkpointing=gpu",
    "`checkpointing=cpu`": "offload=full checkpointing=cpu",
    "`optimizer.overlap_step=false`": "offload=full checkpointing=cpu overlap_step=False",
    "`offload=optimizer`": "offload=optimizer checkpointing=gpu",
    "`offload=seed`": "offload=seed checkpointing=cpu fused_step=False",
    "`plan=fastest`": "plan=fastest",
}


def speeds(df: pd.DataFrame) -> str:
    """Tokens/s by model, length and option, or what became of the cell; then the peaks of GPU and host memory, without and with
    offload. A dash is a cell that was not run."""
    found = tidy.cells(df)
    lines = []
    for (model, tokens), group in found.groupby(["model", "seq_len_tokens"], sort=True):
        by = {heading: _of(group, heading) for heading in _OPTIONS}
        line = [str(model), style.length(tokens), *(_speed(cell) for cell in by.values())]
        base, offloaded = by["in GPU memory"], by["`checkpointing=cpu`"]
        for name in ("peak_vram_gib", "peak_host_gib"):
            line.append(" / ".join(_number(cell, name) for cell in (base, offloaded)))
        lines.append(line)
    heads = ["model", "tokens", *_OPTIONS, "VRAM, GiB", "host, GiB"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


def _of(group: pd.DataFrame, heading: str) -> pd.Series | None:
    cells = group[group["variant"] == _OPTIONS[heading]]
    return cells.iloc[0] if len(cells) else None


def _speed(cell: pd.Series | None) -> str:
    if cell is None:
        return "-"
    return str(cell.failure) if math.isnan(cell.tokens_per_s) else f"{cell.tokens_per_s:.0f}"


def _number(cell: pd.Series | None, name: str) -> str:
    return "-" if cell is None or math.isnan(cell[name]) else f"{cell[name]:.1f}"
