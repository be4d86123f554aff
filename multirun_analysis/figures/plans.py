"""The figure of a map of plans: expected throughput against length, for each model and machine."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldft.errors import ResultsError
from ldft.terminal import plural
from multirun_analysis import style
from multirun_analysis.figures import layout

_COLUMNS = {"model", "machine", "rates", "goal", "num_ranks", "tokens", "fits"}
_BOUNDS = {"arithmetic": "o", "Python": "v", "link": "s", "host update": "^"}


def load(path: Path) -> pd.DataFrame:
    """The rows that `python -m ldft.plan -m ... --rows PATH` wrote. Raises ResultsError."""
    try:
        found = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        reason = "no such file" if isinstance(error, FileNotFoundError) else reason
        raise ResultsError(f"{path}: {reason}; name a file that python -m ldft.plan -m --rows wrote") from None
    if missing := sorted(_COLUMNS - set(found.columns)):
        raise ResultsError(f"{path}: no column {missing[0]}; name a file that python -m ldft.plan -m --rows wrote")
    return found


def plans(df: pd.DataFrame) -> Figure | str:
    """One panel a machine, one line a model; the marker says what takes most of the time. Lengths at which nothing fits are
    crosses at the bottom."""
    if df.empty:
        return "no plan in the file"
    if not df["fits"].any():
        return "nothing fits on any of these machines"
    table = df.assign(panel=[f"{row.num_ranks} x {row.machine} ({row.rates}), {row.goal}" for row in df.itertuples()])
    colours = {model: style.OTHERS[i % len(style.OTHERS)] for i, model in enumerate(sorted(table["model"].unique()))}
    with style.styled():
        panels = list(table.groupby("panel", sort=True))
        figure, axes_list = layout.grid(len(panels))
        for axes, (title, part) in zip(axes_list, panels, strict=False):
            _panel(axes, part, colours)
            axes.set_title(title)
            style.length_axis(axes, sorted(table["tokens"].unique()))
        axes_list[0].set_ylabel("expected tokens/s")
        lines = [Line2D([], [], color=colour, label=model) for model, colour in colours.items()]
        used = set(table.loc[table["fits"], "bound"])
        marks = [
            Line2D([], [], color="#444444", marker=marker, linestyle="", label=f"bound by {name}")
            for name, marker in _BOUNDS.items()
            if name in used
        ]
        cross = [Line2D([], [], color=style.FAILED, marker="x", linestyle="", label="nothing fits")] * (
            not table["fits"].all()
        )
        longest = table.loc[table[table["fits"]]["tokens"].idxmax()]
        finding = (
            f"Of {plural(len(table), 'plan')} {int(table['fits'].sum())} fit; the longest is {longest.model} at "
            f"{style.length(longest.tokens)} tokens on {longest.num_ranks} x {longest.machine}"
        )
        return layout.finish(figure, finding, [*lines, *marks, *cross])


def _panel(axes: Axes, part: pd.DataFrame, colours: dict[str, str]) -> None:
    for model, mine in part.groupby("model", sort=True):
        fit = mine[mine["fits"]].sort_values("tokens")
        axes.plot(fit["tokens"], fit["tokens_per_s"], color=colours[str(model)])
        for one in fit.itertuples():
            axes.plot(
                [one.tokens],
                [one.tokens_per_s],
                _BOUNDS[one.bound],
                color=colours[str(model)],
                gid=f"{model}|{one.tokens}",
            )
    axes.set(xscale="log", yscale="log")
    missing = part[~part["fits"]]
    bottom = axes.get_ylim()[0]
    axes.set_ylim(bottom)  # else the axis would grow below the crosses
    for one in missing.itertuples():
        axes.plot([one.tokens], [bottom], "x", color=style.FAILED, gid=f"none|{one.model}|{one.tokens}", clip_on=False)
