"""Figures of memory: by node, by role, peaks against length, requested and actual placement, predicted and measured."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from multirun_analysis import style, tidy
from multirun_analysis.figures import layout
from multirun_analysis.figures.speed import NOTHING
from multirun_analysis.style import length, number

_QUANTITIES = {"vram": "VRAM", "host": "host memory"}
# Largest number of placement lines; the best-placed are left out first.
_MAX_LINES = 14


def memory_by_node(df: pd.DataFrame) -> Figure | str:
    """Resident host memory after the last iteration as stacked bars, one colour per NUMA node; hosts are summed."""
    entries = tidy.memory_by_node(df)
    if entries.empty:
        return "no ok row carries memory by node"
    entries = entries.assign(name=[f"node {node}" for node in entries["node"]], gib=entries["total_gib"])
    colours = {f"node {node}": style.node_colour(node) for node in sorted(entries["node"].unique())}
    totals = entries.groupby("name")["gib"].sum()
    if len(colours) == 1:
        finding = f"All resident memory lies on {next(iter(colours))}"
    else:
        shares = ", ".join(f"{name} {100 * totals[name] / totals.sum():.0f}%" for name in colours)
        finding = f"Resident memory over all runs: {shares}"
    biggest = entries.groupby([*tidy.CELL, "run_id", "attempt"])["gib"].sum().groupby(tidy.CELL).mean()
    cell = dict(zip(tidy.CELL, biggest.idxmax(), strict=True))
    finding += f"; the most, {number(biggest.max())} GiB, by {cell['model']} at {length(cell['seq_len_tokens'])}"
    return _stacked(df, entries, colours, finding, "resident host memory (GiB)")


def memory_by_role(df: pd.DataFrame) -> Figure | str:
    """Host memory of each tensor role as stacked bars, all nodes and ranks together."""
    entries = tidy.memory_by_role(df)
    if entries.empty:
        return "no ok row carries memory by role"
    entries = entries.assign(name=entries["role"])
    present = entries.groupby("role")["gib"].sum()
    colours = {role: colour for role, colour in style.ROLES.items() if role in present.index}
    colours |= {role: "#777777" for role in present.index if role not in colours}
    top = str(present.idxmax())
    finding = f"Largest role: {top}, {100 * present[top] / present.sum():.0f}% of the placed host memory over all runs"
    return _stacked(df, entries, colours, finding, "host memory by role (GiB)")


def _stacked(df: pd.DataFrame, entries: pd.DataFrame, colours: dict[str, str], finding: str, axis: str) -> Figure:
    """Bars of `gib` by `name`, one per cell: the mean over its runs. Failed cells have an empty bar with the reason."""
    runs = entries.groupby([*tidy.CELL, "run_id", "attempt"])["gib"].count().groupby(tidy.CELL).count()
    sums = entries.groupby([*tidy.CELL, "name"])["gib"].sum().unstack("name", fill_value=0.0).div(runs, axis=0)
    table = tidy.cells(df)
    carried = pd.MultiIndex.from_frame(table[tidy.CELL]).isin(sums.index)
    table = table[carried | (table["status"] != "ok")]
    series = layout.series_of(table)
    chosen = layout.bar_panels(table)
    with style.styled():
        figure, axes_list = layout.bar_figure([len(part) for _, part in chosen])
        for axes, (title, part) in zip(axes_list, chosen, strict=True):
            mine = sums.reindex(pd.MultiIndex.from_frame(part[tidy.CELL]), fill_value=0.0)
            stacks = {name: mine[name].tolist() for name in colours}
            totals = mine.sum(axis=1).tolist()
            notes = [
                f"{number(total)} GiB" if cell.status == "ok" else cell.failure
                for cell, total in zip(part.itertuples(), totals, strict=True)
            ]
            layout.bars(axes, [layout.bar_label(cell, series) for cell in part.itertuples()], stacks, colours, notes)
            axes.set_title(title)
        axes_list[-1].set_xlabel(axis)
        return layout.finish(figure, finding, layout.colour_handles(colours))


def peak_memory(df: pd.DataFrame) -> Figure | str:
    """Peak device memory (if rows have it) and peak host memory against sequence length; failed cells in a band."""
    table = tidy.cells(df)
    if table.empty:
        return NOTHING
    quantities = {"peak_vram_gib": "peak VRAM of a GPU (GiB)", "peak_host_gib": "peak host memory (GiB)"}
    present = [name for name in quantities if table[name].notna().any()]
    if not present:
        return "no row carries a memory peak"
    panels = layout.panels_of(table)[: layout.MAX_PANELS]
    series = layout.series_of(table)
    with style.styled():
        # A model's two quantities are side by side.
        places = [(name, panel) for panel in panels for name in present]
        figure, axes_list = layout.grid(len(places), layout.band_points(panels, columns=min(len(places), 2)))
        for axes, (name, (title, part)) in zip(axes_list, places, strict=True):
            _peak_panel(axes, name, title, part, series)
            axes.set_ylabel(quantities[name])
        finding = _growth(table, present[0]) + layout.failures_text(table)
        return layout.finish(figure, finding, layout.line_handles(series))


def _peak_panel(axes: Axes, name: str, title: str, part: pd.DataFrame, series: list[layout.Series]) -> None:
    for place, one in enumerate(series):
        ok = one.of(part).dropna(subset=[name]).sort_values("seq_len_tokens")
        if len(ok):
            # Policies often need the same memory: shift markers sideways so that all are visible.
            x = ok["seq_len_tokens"] * 2 ** (0.06 * (place - (len(series) - 1) / 2))
            (line,) = axes.plot(x, ok[name], color=one.colour, marker=one.marker, linestyle=one.line, label=one.label)
            line.set_gid(f"{name}|{title}|{one.label}")
    axes.set_title(title)
    axes.margins(y=0.1)
    style.length_axis(axes, list(part["seq_len_tokens"]))
    layout.failed_band(axes, part, series)


def _growth(table: pd.DataFrame, name: str) -> str:
    """The growth from the shortest to the longest length of the series that grows most."""
    what = "VRAM" if "vram" in name else "host memory"
    known = table.dropna(subset=[name]).sort_values("seq_len_tokens")
    best, grown = None, 0.0
    for _, part in known.groupby(["machine", "model", "policy", "variant"], sort=True):
        first, last = part.iloc[0], part.iloc[-1]
        if last.seq_len_tokens > first.seq_len_tokens and last[name] / first[name] > grown:
            best, grown = (first, last), last[name] / first[name]
    if best is None:
        return f"Peak {what} is at most {number(known[name].max())} GiB"
    first, last = best
    names = {(s.policy, s.variant): s.label for s in layout.series_of(table)}
    who = last.model if len(names) == 1 else f"{last.model} with {names[last.policy, last.variant]}"
    return (
        f"Peak {what} of {who} goes from {number(first[name])} GiB at {length(first.seq_len_tokens)} "
        f"to {number(last[name])} GiB at {length(last.seq_len_tokens)}"
    )


def placement(df: pd.DataFrame) -> Figure | str:
    """Share of each role requested on a node (ring) and found there (dot), mean over ranks; the worst lines first."""
    entries = tidy.placement(df)
    if entries.empty:
        return "no ok row has requested and actual placement"
    keys = [*tidy.CELL, "role", "node"]
    table = entries.groupby(keys, as_index=False)[["share", "requested_share", "difference"]].mean()
    lines = ["machine", "model", "seq_len_tokens", "policy", "variant", "role"]
    worst = table.assign(off=table["difference"].abs()).groupby(lines)["off"].max()
    order = worst.sort_values(ascending=False, kind="stable").index[:_MAX_LINES]
    with style.styled():
        figure = Figure()
        axes = figure.subplots()
        labels = []
        font = FontProperties(family="DejaVu Sans", size=9)
        cells_differ = len({key[:-1] for key in order}) > 1
        for place, key in enumerate(order):
            part = table[(table[lines] == list(key)).all(axis=1)]
            _, model, tokens, policy, variant, role = key
            label = f"{model} {length(tokens)} {policy} {variant}".strip() + f": {role}" if cells_differ else role
            labels.append(layout.wrapped(label, font, 0.45 * 72 * style.WIDTH_IN))
            for entry in part.itertuples():
                colour = style.node_colour(entry.node)
                (ring,) = axes.plot(entry.requested_share, place, "o", mfc="none", mec=colour, ms=11, mew=1.8)
                (dot,) = axes.plot(entry.share, place, "o", color=colour, ms=5)
                ring.set_gid(f"asked|{labels[-1]}|{entry.node}")
                dot.set_gid(f"found|{labels[-1]}|{entry.node}")
        highest = max(label.count("\n") for label in labels)
        figure.set_size_inches(style.WIDTH_IN, (0.30 + 0.15 * highest) * len(order) + 0.8)
        axes.set_yticks(range(len(order)), labels, fontproperties=font)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(-0.04, 1.04)
        axes.set_xlabel("share of the role's bytes on the node")
        handles: list[Line2D] = [
            Line2D([], [], marker="s", linestyle="", color=style.node_colour(node), label=f"node {node}")
            for node in sorted(table["node"].unique())
        ]
        handles.append(Line2D([], [], marker="o", linestyle="", mfc="none", mec="#444444", ms=11, label="asked"))
        handles.append(Line2D([], [], marker="o", linestyle="", color="#444444", ms=5, label="found"))
        off = entries.loc[entries["difference"].abs().idxmax()]
        count = f"; the worst {len(order)} of {len(worst)} shown" if len(worst) > len(order) else ""
        finding = (
            f"Placement is at most {max(100 * abs(off.difference), 0.01):.2g} percentage points off what was asked "
            f"({off.role} on node {off.node}{count})"
        )
        return layout.finish(figure, finding, handles)
