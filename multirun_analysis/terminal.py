"""The summary tables of `python -m multirun_analysis`, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from ldft.terminal import plural
from multirun_analysis import comparison, rows, tidy
from multirun_analysis.style import length, number

# Number of table lines shown on a terminal; the rest are only counted.
MAX_LINES = 40


def _cell_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a cell that differ; always model and length."""
    return [name for name in tidy.CELL if name in ("model", "seq_len_tokens") or table[name].nunique() > 1]


def _shown(value: Any, column: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if column == "seq_len_tokens":
        return length(value)
    return number(value) if isinstance(value, float) else str(value)


def _print(console: Console, title: str, table: pd.DataFrame, columns: dict[str, str], limit: int | None) -> None:
    """Print a heading and a table of `columns` (name in the frame -> heading)."""
    console.print(f"\n{title}", style="bold", soft_wrap=True)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = pd.api.types.is_numeric_dtype(table[column])
        drawn.add_column(columns[column], justify="right" if numeric else "left", overflow="fold")
    shown = table if limit is None else table.head(limit)
    for _, line in shown.iterrows():
        style = "" if line.get("status", "ok") == "ok" else "red"
        drawn.add_row(*(_shown(line[column], column) for column in columns), style=style)
    if left_out := len(table) - len(shown):
        drawn.caption = f"{plural(left_out, 'more line')}; --all shows {'them' if left_out > 1 else 'it'}"
    console.print(drawn)


def _headings(table: pd.DataFrame) -> dict[str, str]:
    return {name: {"seq_len_tokens": "tokens"}.get(name, name) for name in _cell_columns(table)}


def _with_shares(table: pd.DataFrame) -> pd.DataFrame:
    """The table with phases in one column, `12/70/18%`, the update in one, `0.64 s, 8% waited`, and the range of throughputs."""

    def share(cell: Any) -> str:
        parts = [cell.forward_s / cell.iteration_s, cell.backward_s / cell.iteration_s, cell.step_s / cell.iteration_s]
        return "-" if any(math.isnan(part) for part in parts) else "/".join(f"{100 * p:.0f}" for p in parts) + "%"

    def update(cell: Any) -> str:
        hidden = cell.overlap_step and cell.update_s > 0
        return f"{number(cell.update_s)} s, {100 * cell.update_wait_s / cell.update_s:.0f}% waited" if hidden else "-"

    def spread(cell: Any) -> str:
        low, high = cell.tokens_per_s_p10, cell.tokens_per_s_p90
        return "-" if math.isnan(low) else f"{number(low)} - {number(high)}"

    lines = list(table.itertuples())
    outcome = [cell.failure if cell.failure else "ok" for cell in lines]
    return table.assign(
        phases=pd.Series([share(cell) for cell in lines], index=table.index, dtype=object),
        update=pd.Series([update(cell) for cell in lines], index=table.index, dtype=object),
        spread=pd.Series([spread(cell) for cell in lines], index=table.index, dtype=object),
        outcome=pd.Series(outcome, index=table.index, dtype=object),
    )


def summarise(
    df: pd.DataFrame,
    groups: Sequence[str],
    baseline: str | None,
    everything: bool,
    console: Console,
    price: float | None = None,
) -> None:
    """Print a summary of the rows: counts, one line per cell, the front of speed against memory, speed-ups, failures.

    price: of one GPU for one hour.
    """
    limit = None if everything else MAX_LINES
    # Compare first, so that a missing group or baseline is reported before anything is printed.
    comparisons = {group: comparison.compare(df, by=group, baseline=baseline) for group in groups}
    counts = ", ".join(f"{count} {status}" for status, count in df["status"].value_counts().items())
    console.print(f"{plural(len(df), 'row')}: {counts}", soft_wrap=True)
    console.print(f"machine: {'; '.join(sorted(df['machine'].unique()))}", soft_wrap=True)
    console.print(f"ldft at commit: {', '.join(rows.versions_of(df))} (+: with uncommitted changes)", soft_wrap=True)
    if df["source_hash"].nunique() > 1:
        console.print(f"note: the rows come from {df['source_hash'].nunique()} versions of the code", style="yellow")
    table = _with_shares(tidy.cells(df))
    if price is not None:
        table["cost"] = price * table["gpu_hours_per_billion_tokens"]
    columns = _headings(table) | {
        "runs": "runs",
        "tokens_per_s": "tokens/s",
        "spread": "10-90%",
        "iteration_s": "s/iteration",
        "phases": "fwd/bwd/step",
        "update": "update beside fwd",
        "peak_host_gib": "host GiB",
        "peak_vram_gib": "VRAM GiB",
        "mfu": "MFU",
        "gpu_hours_per_billion_tokens": "GPU h/1e9 tokens",
        **({} if price is None else {"cost": f"cost/1e9 tokens at {price:g}/h"}),
        "outcome": "outcome",
    }
    of_gpus = ("peak_vram_gib", "mfu", "gpu_hours_per_billion_tokens")
    columns = {name: head for name, head in columns.items() if name not in of_gpus or table[name].notna().any()}
    if not table["overlap_step"].any():
        del columns["update"]
    _print(console, "Cells", table, columns, limit)
    _print_front(table, console, limit)
    for group, compared in comparisons.items():
        if len(compared):
            _print_compared(compared, group, console, limit)
    failed = table[table["failure"] != ""]
    if len(failed):
        heads = _headings(failed) | {"failure": "what", "error_message": "message", "log_path": "log"}
        _print(console, "Failed", failed.drop(columns="status"), heads, limit)
    apart = df[df["apart"] & ~df["superseded"]]
    if len(apart):
        counts = apart.groupby("error_message", sort=False).size().rename("rows").reset_index()
        _print(
            console,
            "Refused for a value that no other row has",
            counts,
            {"rows": "rows", "error_message": "message"},
            limit,
        )


def _print_front(table: pd.DataFrame, console: Console, limit: int | None) -> None:
    memory = "peak_vram_gib" if table["peak_vram_gib"].notna().any() else "peak_host_gib"
    front = tidy.pareto(table, x=memory, y="tokens_per_s")
    if len(front) and len(front) < table["tokens_per_s"].notna().sum():
        heads = _headings(table) | {"tokens_per_s": "tokens/s", memory: "VRAM GiB" if "vram" in memory else "host GiB"}
        title = "Best choices for each model and length: no other cell is both faster and smaller"
        _print(console, title, front, heads, limit)


def _ratio(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{low:.3f} - {high:.3f}"


def _three_digits(values: pd.Series) -> pd.Series:
    return values.map(lambda value: "-" if math.isnan(value) else f"{value:.3f}").astype(object)


def _print_compared(compared: pd.DataFrame, by: str, console: Console, limit: int | None) -> None:
    lines = compared.assign(
        speedup=_three_digits(compared["speedup"]),
        interval=[_ratio(line.low, line.high) for line in compared.itertuples()],
    )
    # Drop the compared group's own column: it would repeat the option.
    heads = {name: head for name, head in _headings(compared).items() if name != {"numa": "policy"}.get(by)}
    heads |= {"option": by, "runs": "runs", "speedup": "speed-up", "interval": "95% interval", "basis": "basis"}
    heads |= {"verdict": f"against {compared['baseline'].iloc[0]}"}
    _print(console, f"Speed-up over {rows.option_name(by, compared['baseline'].iloc[0])}", lines, heads, limit)


def print_gate(table: pd.DataFrame, refused: pd.DataFrame, below: float, console: Console) -> None:
    """Print what the gate refuses, one line a cell, and of how many cells."""
    for line in refused.itertuples():
        ratio = f": b/a {line.speedup:.3f}, {_ratio(line.low, line.high)}" if line.why == "slower" else ""
        cell = f"{line.model} {length(line.seq_len_tokens)} {line.policy} {line.variant}".rstrip()
        console.print(f"refused: {cell}: {line.why}{ratio}", soft_wrap=True)
    unknown = int((table["change"] == "no confidence").sum())
    hint = f"; {unknown} have one iteration a side, which gives no interval" if unknown else ""
    console.print(
        f"refused: {len(refused)} of {plural(len(table), 'cell')} (--fail-below {below:g}){hint}", soft_wrap=True
    )


def print_diff(table: pd.DataFrame, commits: tuple[list[str], list[str]], everything: bool, console: Console) -> None:
    """Print what changed between two folders: one line per cell, then the counts."""
    for side, names in zip("ab", commits, strict=True):
        console.print(f"{side}: ldft at commit {', '.join(names) or 'unknown'}", soft_wrap=True)
    if table.empty:
        console.print("neither folder has a row")
        return
    lines = table.assign(
        speedup=_three_digits(table["speedup"]),
        interval=[_ratio(line.low, line.high) for line in table.itertuples()],
    )
    heads = _headings(table) | {
        "tokens_per_s_a": "tokens/s a",
        "tokens_per_s_b": "b",
        "speedup": "b/a",
        "interval": "95% interval",
        "peak_host_gib_a": "host GiB a",
        "peak_host_gib_b": "b",
        "peak_vram_gib_a": "VRAM GiB a",
        "peak_vram_gib_b": "b",
        "change": "change",
    }
    if table[["peak_vram_gib_a", "peak_vram_gib_b"]].isna().all(axis=None):
        heads = {name: head for name, head in heads.items() if "vram" not in name}
    _print(console, "Changes from a to b", lines, heads, None if everything else MAX_LINES)
    counts = table["change"].value_counts()
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()))
