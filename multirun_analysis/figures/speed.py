"""Figures of speed: throughput against length, iteration time by phase, speed-up over a baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ldft.terminal import plural
from multirun_analysis import comparison, rows, style, tidy
from multirun_analysis.figures import layout
from multirun_analysis.style import length, number

NOTHING = "no row to draw"
# A speed-up of one model or length over another would be meaningless.
_NEVER_COMPARED = {"model", "numa", "seq_len", *rows.SAME_CELL}


def throughput(df: pd.DataFrame) -> Figure | str:
    """tokens/s against sequence length: one point per cell, its bar the 10-90% range of iterations; failed cells in a band."""
    table = tidy.cells(df)
    if table.empty:
        return NOTHING
    with style.styled():
        panels = layout.panels_of(table)[: layout.MAX_PANELS]
        series = layout.series_of(table)
        figure, axes_list = layout.grid(len(panels), layout.band_points(panels))
        for axes, (title, part) in zip(axes_list, panels, strict=True):
            _throughput_panel(axes, title, part, series)
        axes_list[0].set_ylabel("throughput (tokens/s)")
        finding = _throughput_finding(table) + layout.failures_text(table)
        ranges = Line2D([], [], color="#444444", marker="|", ms=11, mew=1.8, linestyle="", label="10-90% of iterations")
        return layout.finish(figure, finding, [*layout.line_handles(series), ranges])


def _throughput_panel(axes, title: str, part: pd.DataFrame, series: list[layout.Series]) -> None:  # type: ignore[no-untyped-def]
    drawn = [s for s in series if len(s.of(part))]
    for place, one in enumerate(drawn):
        ok = one.of(part)
        ok = ok[ok["status"] == "ok"].sort_values("seq_len_tokens")
        if ok.empty:
            continue
        # Shift points of one length sideways so that their ranges do not overlap.
        x = ok["seq_len_tokens"] * 2 ** (0.05 * (place - (len(drawn) - 1) / 2))
        y = ok["tokens_per_s"]
        # A run's median is inside its range; the median over runs may be outside the pooled range by rounding.
        low, high = (y - ok["tokens_per_s_p10"]).clip(lower=0), (ok["tokens_per_s_p90"] - y).clip(lower=0)
        drawn_line = axes.errorbar(
            x,
            y,
            yerr=[low, high],
            color=one.colour,
            marker=one.marker,
            linestyle=one.line,
            capsize=2.5,
            label=one.label,
        )
        drawn_line.lines[0].set_gid(f"ok|{title}|{one.label}")
    axes.set_title(title)
    style.length_axis(axes, list(part["seq_len_tokens"]))
    layout.failed_band(axes, part, series)


def _throughput_finding(table: pd.DataFrame) -> str:
    ok = table[table["status"] == "ok"]
    if ok.empty:
        return "No cell ran to its end"
    series = layout.series_of(table)
    names = {(s.policy, s.variant): s.label for s in series}
    races = [group for _, group in ok.groupby(["machine", "model", "seq_len_tokens"]) if len(group) > 1]
    if races:
        winners = pd.Series([names[tuple(g.loc[g["tokens_per_s"].idxmax(), ["policy", "variant"]])] for g in races])
        counts = winners.value_counts()
        best = min(counts.index, key=lambda name: (-counts[name], name))
        return f"Highest median throughput: {best}, in {counts[best]} of {len(races)} pairs of model and length"
    first = ok.sort_values(["seq_len_tokens"]).groupby(["machine", "model", "policy", "variant"], sort=True)
    name, part = max(first, key=lambda item: len(item[1]))
    start, end = part.iloc[0], part.iloc[-1]
    if len(part) == 1:
        return f"{layout.cell_name(start)}: {number(start.tokens_per_s)} tokens/s"
    return (
        f"{name[1]}: {number(start.tokens_per_s)} tokens/s at {length(start.seq_len_tokens)}, "
        f"{number(end.tokens_per_s)} at {length(end.seq_len_tokens)}"
    )


def phases(df: pd.DataFrame) -> Figure | str:
    """Seconds of an iteration as stacked bars of forward, backward and step; failed cells have an empty bar with the reason.

    A thin bar below shows when the fused step's update ran: at the end of the step or, overlapped, from the start of the forward
    pass on. The part for which training waited is hatched, at its end: rows say how long training waited, not when.
    """
    table = tidy.cells(df)
    if table.empty:
        return NOTHING
    chosen = layout.bar_panels(table)
    series = layout.series_of(table)
    with style.styled():
        figure, axes_list = layout.bar_figure([len(part) for _, part in chosen])
        for axes, (title, part) in zip(axes_list, chosen, strict=True):
            stacks = {phase: part[f"{phase}_s"].clip(lower=0).tolist() for phase in style.PHASES}
            notes = [
                f"{number(cell.iteration_s)} s" + (f" ({cell.failure})" if cell.failure else "")
                if cell.status == "ok"
                else cell.failure
                for cell in part.itertuples()
            ]
            labels = [layout.bar_label(cell, series) for cell in part.itertuples()]
            layout.bars(axes, labels, stacks, style.PHASES, notes, [_update(cell) for cell in part.itertuples()])
            axes.set_title(title)
        axes_list[-1].set_xlabel("median iteration time (s)")
        handles = layout.colour_handles(style.PHASES)
        if table["update_s"].gt(0).any():
            handles += layout.colour_handles({"update": style.UPDATE})
            hatched = Patch(facecolor="white", edgecolor=style.UPDATE, hatch=layout.HATCH, linewidth=0.6)
            hatched.set_label("update, training waits")
            handles.append(hatched)
        return layout.finish(figure, _phases_finding(df) + _update_finding(table), handles)


def _update(cell: Any) -> layout.Beside | None:
    """When a cell's update ran, in seconds of the iteration; None without one."""
    if not cell.update_s > 0:
        return None
    begin = 0.0 if cell.overlap_step else cell.forward_s + cell.backward_s + cell.step_s - cell.update_s
    return layout.Beside(begin, cell.update_s, cell.update_wait_s)


def _update_finding(table: pd.DataFrame) -> str:
    """What of an overlapped update is not hidden, in the median cell; nothing if none is overlapped."""
    beside = table[table["overlap_step"] & table["update_s"].gt(0)]
    if beside.empty:
        return ""
    waited = 100 * (beside["update_wait_s"] / beside["update_s"]).median()
    return f"; of an update beside the next forward pass, training waits for {waited:.0f}%"


def _phases_finding(df: pd.DataFrame) -> str:
    long = tidy.phases(df)
    long = long[long["phase"] != "other"].dropna(subset=["share"])
    if long.empty:
        return "No cell ran to its end"
    shares = long.groupby("phase")["share"].median()
    longest = str(shares.idxmax())
    low, high = long.loc[long["phase"] == longest, "share"].quantile([0, 1])
    text = f"{longest.capitalize()} takes {100 * shares[longest]:.0f}% of an iteration"
    return text + (f" in the median cell, {100 * low:.0f}% to {100 * high:.0f}% over all" if high - low > 0.01 else "")


def groups_to_compare(df: pd.DataFrame) -> list[str]:
    """The config groups that these rows can compare, policy first: rows differ in the group and agree in everything else."""
    names = {name.removeprefix("cfg.").split(".")[0] for name in df.columns if name.startswith("cfg.")}
    df = rows.live(df)
    found = ["numa"] if df["policy"].nunique() > 1 and len(comparison.compare(df, by="numa")) else []
    for group in sorted(names - _NEVER_COMPARED):
        if rows.option_label(df, group).nunique() > 1 and len(comparison.compare(df, by=group)):
            found.append(group)
    return found


def speedup(df: pd.DataFrame, by: str | None = None, baseline: str | None = None) -> Figure | str:
    """Speed-up over the baseline against length, with 95% intervals; hollow markers where the interval includes no difference."""
    if df.empty:
        return NOTHING
    by = by or next(iter(groups_to_compare(df)), None)
    if by is None:
        return "nothing to compare: the rows have one option of every group"
    baseline = baseline or comparison.default_baseline(df, by)
    table = comparison.compare(df, by=by, baseline=baseline)
    ok = table[table["speedup"].notna()]
    if ok.empty:
        return f"no cell ran to its end with {by}={baseline} and with another option"
    named = rows.option_name(by, baseline)
    with style.styled():
        panels = layout.panels_of(ok)[: layout.MAX_PANELS]
        # Series are taken from all cells, so that each looks the same as in the other figures.
        series = [s for s in layout.series_of(tidy.cells(df)) if len(s.of(ok))]
        figure, axes_list = layout.grid(len(panels))
        for axes, (title, part) in zip(axes_list, panels, strict=True):
            axes.axhline(1, color="#444444", linewidth=1.2)
            _speedup_panel(axes, title, part, series)
        axes_list[0].set_ylabel("speed-up, 95% confidence")
        handles = [*layout.line_handles(series), Line2D([], [], color="#444444", linewidth=1.2, label=f"{named} = 1")]
        handles.append(
            Line2D([], [], color="#444444", marker="o", mfc="white", linestyle="", label="no difference found")
        )
        return layout.finish(figure, _speedup_finding(ok, by, named), handles)


def _speedup_panel(axes, title: str, part: pd.DataFrame, series: list[layout.Series]) -> None:  # type: ignore[no-untyped-def]
    drawn = [s for s in series if len(s.of(part))]
    for place, one in enumerate(drawn):
        mine = one.of(part).sort_values("seq_len_tokens")
        x = mine["seq_len_tokens"] * 2 ** (0.06 * (place - (len(drawn) - 1) / 2))
        y = mine["speedup"]
        low, high = (y - mine["low"]).fillna(0), (mine["high"] - y).fillna(0)
        bars = axes.errorbar(x, y, yerr=[low, high], color=one.colour, linestyle=one.line, capsize=2.5, label=one.label)
        bars.lines[0].set_gid(f"speedup|{title}|{one.label}")
        for filled in (True, False):
            which = mine["verdict"].isin(["faster", "slower"]) == filled
            face = one.colour if filled else "white"
            (marks,) = axes.plot(
                x[which], y[which], color=one.colour, marker=one.marker, linestyle="", mfc=face, zorder=3
            )
            marks.set_gid(f"{'differs' if filled else 'same'}|{title}|{one.label}")
    axes.set_title(title)
    style.length_axis(axes, list(part["seq_len_tokens"]))
    edges = np.array([*part["low"].dropna(), *part["high"].dropna(), *part["speedup"], 1.0])
    margin = 0.08 * max(edges.max() - edges.min(), 0.02)
    axes.set_ylim(edges.min() - margin, edges.max() + margin)


def _speedup_finding(ok: pd.DataFrame, by: str, baseline: str) -> str:
    best = ok.loc[ok["speedup"].idxmax()]
    counts = ok["verdict"].value_counts()
    said = ", ".join(f"{count} {name}" for name, count in counts.sort_index().items())
    pairs = plural(len(ok), "pair")
    if best.verdict == "faster":
        option = rows.option_name(by, best.option)
        where = f"{best.model} {length(best.seq_len_tokens)}"
        return f"Up to {best.speedup:.2f} times as fast as {baseline}: {option} ({where}); of {pairs} {said}"
    return f"Nothing is faster than {baseline} for certain; of {pairs} {said}"
