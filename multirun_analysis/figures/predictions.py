"""Figures of what was expected before a run against what was measured: memory and times."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from multirun_analysis import style, tidy
from multirun_analysis.figures import layout

_MEMORIES = {"host": "host memory", "vram": "GPU memory"}


def predicted(df: pd.DataFrame) -> Figure | str:
    """Measured against predicted memory on equal logarithmic axes; on the line the prediction is exact, the band is 10%."""
    table = tidy.predicted(df).rename(columns={"predicted_gib": "predicted", "measured_gib": "measured"})
    if table.empty:
        return "no ok row carries a memory prediction"
    table["title"] = table["quantity"].map(_MEMORIES)
    return _against(table, "memory", "measured peak (GiB)", "predicted (GiB)")


def predicted_times(df: pd.DataFrame) -> Figure | str:
    """The same for the times of an iteration and of its phases."""
    table = tidy.predicted_times(df).rename(columns={"predicted_s": "predicted", "measured_s": "measured"})
    if table.empty:
        return "no ok row carries a predicted time (python -m ldft.bench machine)"
    return _against(table.assign(title=table["quantity"]), "time", "measured median (s)", "predicted (s)")


def _against(table: pd.DataFrame, what: str, across: str, up: str) -> Figure:
    with style.styled():
        quantities = list(dict.fromkeys(table["quantity"]))
        figure, axes_list = layout.grid(len(quantities))
        series = layout.series_of(table)
        for axes, quantity in zip(axes_list, quantities, strict=True):
            part = table[table["quantity"] == quantity]
            values = np.concatenate([part["predicted"], part["measured"]]).astype(float)
            edge = np.array([values.min() / 1.4, values.max() * 1.4])
            axes.fill_between(edge, edge / 1.1, edge * 1.1, color="#DDDDDD", linewidth=0)
            axes.plot(edge, edge, color="#444444", linewidth=1)
            for one in series:
                mine = one.of(part)
                if len(mine):
                    (dots,) = axes.plot(
                        mine["measured"], mine["predicted"], one.marker, color=one.colour, label=one.label
                    )
                    dots.set_gid(f"{quantity}|{one.label}")
            axes.set(xscale="log", yscale="log", xlim=edge, ylim=edge, xlabel=across)
            for axis in (axes.xaxis, axes.yaxis):
                # Few ticks, chosen by the values: the default ticks of a short logarithmic axis overlap.
                axis.set_major_locator(FixedLocator(_ticks(*edge)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_title(part["title"].iloc[0])
        axes_list[0].set_ylabel(up)
        off = (table["ratio"] - 1).abs()
        worst = table.loc[off.idxmax()]
        finding = (
            f"Predicted {what} is off by {100 * off.median():.1f}% in the median, {100 * off.max():.1f}% at the worst "
            f"({layout.cell_name(worst)}, {worst.title})"
        )
        handles = [Line2D([], [], color=s.colour, marker=s.marker, linestyle="", label=s.label) for s in series]
        return layout.finish(figure, finding, handles)


def _ticks(low: float, high: float) -> list[float]:
    """At most six round numbers (1, 2, 5 times a power of ten, or powers only) from `low` to `high`; the two ends if there is
    none."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if 2 <= len(ticks) <= 6:
            return ticks
    return [float(f"{value:.2g}") for value in (low * 1.1, high / 1.1)]
