"""Figures of one run over time, from its trace: host memory by node and by role, VRAM and PCIe."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ldft.terminal import plural
from multirun_analysis import style, traces
from multirun_analysis.figures import layout
from multirun_analysis.style import number

NO_TRACE = "no row has a trace; runs leave one with monitor.interval_s above 0"
# Phase names on the axis, and the fraction of the axis that a letter takes.
_NAMES = {"checkpoint_buffers": "buffers", "train": "training", "teardown": "end"}
_LETTER = 0.0125
_LINK = {"rx": ("#009E73", "to the GPU"), "tx": ("#CC79A7", "from the GPU")}


def memory_over_time(df: pd.DataFrame) -> Figure | str:
    """Host memory of the run that has the most, stacked by NUMA node above and by role below; phases marked, the peak named."""
    found = traces.traced(df)
    if found.empty:
        return NO_TRACE
    row = found.iloc[0]
    trace = traces.read(row)
    by_node, by_role = traces.memory_by_node(trace), traces.memory_by_role(trace)
    if by_node.empty:
        return "the trace of the run with the most host memory ended before its memory was read"
    total = by_node.sum(axis=1)
    peak_s = float(total.idxmax())
    node_colours = {f"node {node}": style.node_colour(node) for node in by_node}
    roles = [role for role in style.ROLES if role in by_role] + sorted(set(by_role) - set(style.ROLES))
    role_colours = {role: style.ROLES.get(role, "#777777") for role in roles}
    with style.styled():
        figure, (above, below) = _two_panels()
        parts = ((above, by_node, node_colours), (below, by_role[roles], role_colours))
        for axes, table, colours in parts:
            areas = axes.stackplot(table.index, table.to_numpy().T, colors=list(colours.values()), linewidth=0)
            for area, name in zip(areas, colours, strict=True):
                area.set_gid(f"area|{name}")
            axes.set_ylim(0, 1.16 * total.max())
            axes.set_ylabel("host memory (GiB)")
        (mark,) = above.plot(peak_s, total.max(), "o", color="black", ms=5)
        mark.set_gid("peak")
        _peak_label(above, peak_s, total.max(), trace["elapsed_s"].iloc[-1])
        _mark_phases([above, below], trace)
        above.set_title("by NUMA node, all ranks")
        below.set_title("by role of the tensors, all nodes")
        below.set_xlabel("seconds since the ranks began")
        finding = f"Host memory of {layout.cell_name(row)} peaks at {number(total.max())} GiB {_when(trace, peak_s)}"
        return layout.finish(figure, finding, layout.colour_handles(node_colours | role_colours))


def devices_over_time(df: pd.DataFrame) -> Figure | str:
    """VRAM of each rank's GPU and PCIe rates, all GPUs together, of the run with the most host memory that has both."""
    for _, row in traces.traced(df[df["device_type"] == "cuda"]).iterrows():
        trace = traces.read(row)
        table = traces.devices(trace)
        if len(table) and table["vram_used_gib"].notna().any():
            return _devices(row, trace, table)
    return NO_TRACE if traces.traced(df).empty else "no trace has samples of a GPU"


def _devices(row: pd.Series, trace: pd.DataFrame, table: pd.DataFrame) -> Figure:
    with style.styled():
        figure, (above, below) = _two_panels()
        handles: list[Line2D | Patch] = []
        for place, (rank, part) in enumerate(table.groupby("rank")):
            colour, line = style.OTHERS[place % len(style.OTHERS)], style.LINES[place // len(style.OTHERS)]
            (drawn,) = above.plot(part["elapsed_s"], part["vram_used_gib"], color=colour, linestyle=line)
            drawn.set_gid(f"vram|{rank}")
            handles.append(Line2D([], [], color=colour, linestyle=line, label=f"VRAM of rank {rank}"))
        limit = float(table["vram_total_gib"].max())
        above.axhline(limit, color="#444444", linewidth=1, linestyle="--")
        above.set_ylim(0, 1.16 * limit)
        above.set_ylabel("VRAM in use (GiB)")
        above.set_title(f"VRAM of each GPU; the dashed line is all of it, {number(limit)} GiB")
        rates = table.groupby("elapsed_s")[[f"pcie_{way}_gb_per_s" for way in _LINK]].sum(min_count=1)
        for way, (colour, name) in _LINK.items():
            drawn = below.plot(rates.index, rates[f"pcie_{way}_gb_per_s"], color=colour, marker=".", linewidth=1)[0]
            drawn.set_gid(f"pcie|{way}")
            handles.append(Line2D([], [], color=colour, marker=".", linewidth=1, label=f"PCIe {name}"))
        below.set_ylim(0, 1.2 * max(float(rates.max().max()), 0.1))
        below.set_ylabel("PCIe (GB/s)")
        below.set_title("PCIe, all GPUs together; each point is a window of 20 ms")
        _mark_phases([above, below], trace)
        below.set_xlabel("seconds since the ranks began")
        highest = table.loc[table["vram_used_gib"].idxmax()]
        training = rates[rates.index.isin(table.loc[table["phase"] == "train", "elapsed_s"])].median()
        finding = (
            f"VRAM of {layout.cell_name(row)} peaks at {number(highest.vram_used_gib)} GiB "
            f"{_when(trace, highest.elapsed_s)}"
        )
        if training.notna().all():
            finding += (
                f"; PCIe in training, median: {number(training.iloc[0])} GB/s to the GPUs, "
                f"{number(training.iloc[1])} GB/s back"
            )
        return layout.finish(figure, finding, handles)


def _two_panels() -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(style.WIDTH_IN, 5.2))
    return figure, list(figure.subplots(2, 1, sharex=True))


def _when(trace: pd.DataFrame, elapsed_s: float) -> str:
    """`in iteration 3`, or the phase, of a moment."""
    sample = trace[trace["elapsed_s"] <= elapsed_s].iloc[-1]
    if sample["phase"] == "train":
        return f"in iteration {sample['iteration'] + 1}"
    return (
        f"after training, after {plural(int(sample['iteration']), 'iteration')}"
        if sample["iteration"]
        else f"in phase {sample['phase']}"
    )


def _peak_label(axes: Axes, x: float, y: float, end: float) -> None:
    left = x > 0.6 * end
    axes.annotate(
        f"peak {number(y)} GiB",
        (x, y),
        xytext=(-8 if left else 8, -8),  # below the peak: above it are the names of the phases
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=10,
        bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 2},
    )


def _mark_phases(panels: list[Axes], trace: pd.DataFrame) -> None:
    """Draw a line where each phase begins, with preparation phases on grey; put names above the data where there is room."""
    found, end = traces.phases(trace), max(float(trace["elapsed_s"].iloc[-1]), 1e-3)
    names = [(phase.begin_s, phase.end_s, _NAMES.get(phase.phase, phase.phase)) for phase in found.itertuples()]
    named = [name for name in names if _has_room(*name, end)]
    before = found[~found["phase"].isin(("train", "teardown"))]
    if len(before) and not any(begin in before["begin_s"].to_numpy() for begin, _, _ in named):
        named += [together for together in [(0.0, before["end_s"].iloc[-1], "preparing")] if _has_room(*together, end)]
    font = FontProperties(family="DejaVu Sans", size=9)
    for axes in panels:
        axes.set_xlim(0, end)
        axes.grid(axis="x", visible=False)
        for phase in found.itertuples():
            if phase.begin_s > 0:
                axes.axvline(phase.begin_s, color="#888888", linewidth=0.8).set_gid(f"phase|{phase.phase}")
            if phase.phase != "train":
                axes.axvspan(phase.begin_s, phase.end_s, color="#F0F0F0", zorder=-1, linewidth=0)
        for begin_s, end_s, name in named:
            text = axes.text((begin_s + end_s) / 2, 0.985, name, transform=axes.get_xaxis_transform())
            text.set(ha="center", va="top", color="#444444", fontproperties=font)


def _has_room(begin_s: float, end_s: float, name: str, whole_s: float) -> bool:
    return end_s - begin_s > _LETTER * len(name) * whole_s
