"""Layout shared by figures: one series per policy and variant, one panel per model, the band of failed cells, the finding on
top."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ldft.terminal import plural
from multirun_analysis import style

# With more bars than this, a figure is unreadable at half width; panels share them, with a minimum for each.
MAX_BARS = 16
_LEAST_BARS = 8
# Largest number of panels; the first ones (in table order) are drawn, and the title says so.
MAX_PANELS = 6
# Heights in points: of a panel's data area, and of its surroundings (title, ticks, label).
_DATA_PT, _AROUND_PT = 125, 65
# In the band of failed cells, in points: step between crosses, height of a line of text, width of a letter.
_CROSS_PT, _LINE_PT, _LETTER_PT = 11, 10.5, 5.0
# Fills what was waited for.
HATCH = "//////"
# Width of the handle before a legend label, in points.
_HANDLE_PT = 45


@dataclass(frozen=True, slots=True)
class Series:
    """One policy and variant, with its style and its legend label."""

    policy: str
    variant: str
    label: str
    colour: str
    marker: str
    line: str

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["policy"] == self.policy) & (table["variant"] == self.variant)]


def series_of(table: pd.DataFrame) -> list[Series]:
    """The series in a table of cells. With several policies, colour and marker show the policy and line styles the variant;
    with one policy in several variants, colours and markers show the variant."""
    pairs = list(dict.fromkeys(zip(table["policy"], table["variant"], strict=True)))
    pairs.sort()
    policies, variants = sorted({p for p, _ in pairs}), sorted({v for _, v in pairs})
    found = []
    for policy, variant in pairs:
        place = variants.index(variant)
        colour, marker = style.policy_style(policy)
        line = style.LINES[place % len(style.LINES)]
        if len(variants) > len(style.LINES):  # then only the colour shows the policy
            marker = style.MARKERS[place % len(style.MARKERS)]
            line = style.LINES[place // len(style.MARKERS) % len(style.LINES)]
        label = policy if len(variants) == 1 else f"{policy}, {variant or 'else'}"
        if len(policies) == 1 and len(variants) > 1:
            colour, marker = style.OTHERS[place % len(style.OTHERS)], style.MARKERS[place % len(style.MARKERS)]
            line = style.LINES[place // len(style.OTHERS) % len(style.LINES)]
            label = variant or "else"
        found.append(Series(policy, variant, label, colour, marker, line))
    return found


def panels_of(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, cells) of each machine and model; the title names the machine if there are several."""
    several = table["machine"].nunique() > 1
    return [
        (f"{model}, {machine}" if several else str(model), part)
        for (machine, model), part in table.groupby(["machine", "model"], sort=True)
    ]


def cell_name(cell: Any) -> str:
    """`tiny 4k bind_0 checkpointing=gpu`, for a title."""
    name = f"{cell.model} {style.length(cell.seq_len_tokens)} {cell.policy}"
    return f"{name} {cell.variant}".strip()


def grid(count: int, band_pt: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, two per row, each with room for a band of failed cells `band_pt` points high."""
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(style.WIDTH_IN, lines * (_DATA_PT + _AROUND_PT + band_pt) / 72))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, list(axes[:count])


def finish(figure: Figure, finding: str, handles: Sequence[Line2D | Patch] = ()) -> Figure:
    """Put the finding on top, wrapped to the width, and one legend for all panels below; the figure grows by both."""
    font = FontProperties(family="DejaVu Sans", weight="bold", size=12)
    title = wrapped(finding, font, 0.97 * 72 * style.WIDTH_IN)
    figure.suptitle(title, x=0.01, ha="left", fontproperties=font)
    lines = 0
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), int(78 / (longest + 7))))
        lines = -(-len(handles) // columns)
        if columns == 1:  # a label may be wider than the figure
            legend_font = FontProperties(family="DejaVu Sans", size=10)
            for handle in handles:
                label = wrapped(str(handle.get_label()), legend_font, 0.97 * 72 * style.WIDTH_IN - _HANDLE_PT)
                handle.set_label(label)
                lines += label.count("\n")
        figure.legend(handles=list(handles), loc="outside lower left", ncols=columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * (title.count("\n") + 1) + 0.21 * lines + 0.15)
    return figure


def wrapped(sentence: str, font: FontProperties, width_points: float) -> str:
    """Break a sentence into lines by measured width: letter widths differ too much to count letters."""
    renderer = RendererAgg(1, 1, 72)  # at 72 dots an inch its pixels are points
    lines = [""]
    for word in sentence.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if renderer.get_text_width_height_descent(longer, font, False)[0] <= width_points:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def line_handles(series: Sequence[Series]) -> list[Line2D]:
    return [Line2D([], [], color=s.colour, marker=s.marker, linestyle=s.line, label=s.label) for s in series]


def colour_handles(colours: dict[str, str]) -> list[Patch]:
    return [Patch(facecolor=colour, label=name) for name, colour in colours.items()]


def _columns_of_failures(part: pd.DataFrame) -> list[tuple[int, pd.DataFrame, list[str]]]:
    """(length, failed cells, what happened as one word per line) for each length at which a cell failed."""
    failed = part[part["failure"] != ""]
    found = []
    for tokens, group in failed.groupby("seq_len_tokens", sort=True):
        group = group.sort_values(["failure", "policy", "variant"])
        found.append(
            (int(tokens), group, [word for label in sorted(set(group["failure"])) for word in label.split(" ")])
        )
    return found


def _upright(part: pd.DataFrame, words: Sequence[str], columns: int) -> bool:
    """Whether labels of neighbouring lengths would overlap and must be rotated upright."""
    octaves = np.log2(part["seq_len_tokens"].max() / part["seq_len_tokens"].min()) + 1.2
    lengths = np.sort(part["seq_len_tokens"].unique())
    closest = np.log2(lengths[1:] / lengths[:-1]).min() if len(lengths) > 1 else octaves
    room_pt = closest * (0.86 * 72 * style.WIDTH_IN / columns - 20) / octaves
    return bool(max(map(len, words), default=0) * _LETTER_PT > room_pt)


def _band(part: pd.DataFrame, columns: int) -> tuple[float, float, bool]:
    """Points that the crosses and words of a panel need, and whether the words are upright."""
    failures = _columns_of_failures(part)
    if not failures:
        return 0.0, 0.0, False
    upright = _upright(part, [word for _, _, words in failures for word in words], columns)
    letters = max(len(" ".join(words)) for _, _, words in failures)
    lines = max(len(words) for _, _, words in failures)
    crosses = _CROSS_PT * (max(len(group) for _, group, _ in failures) + 0.7)
    return crosses, letters * _LETTER_PT + 6 if upright else lines * _LINE_PT + 3, upright


def band_points(panels: Sequence[tuple[str, pd.DataFrame]], columns: int | None = None) -> float:
    """Height, in points, of the highest band of failed cells among the panels."""
    columns = columns or min(len(panels), 2)
    return max(sum(_band(part, columns)[:2]) for _, part in panels)


def failed_band(axes: Axes, part: pd.DataFrame, series: Sequence[Series]) -> None:
    """Mark the failed cells of a panel in a band below zero: a cross per cell at its length, with the failure below it.

    Call it after drawing the data: the band's height depends on the axis.
    """
    largest = axes.dataLim.ymax
    top = 1.08 * largest if np.isfinite(largest) and largest > 0 else 1.0
    spec = axes.get_subplotspec()
    assert spec is not None, "panels are made by grid()"
    crosses_pt, words_pt, upright = _band(part, spec.get_gridspec().ncols)
    axes.set_ylim(0, top)
    if not crosses_pt:
        return
    point = top / _DATA_PT
    bottom = -(crosses_pt + words_pt) * point
    axes.axhspan(bottom, 0, color=style.FAILED, alpha=0.07, linewidth=0)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top])
    axes.set_ylim(bottom, top)
    for tokens, group, words in _columns_of_failures(part):
        for row, (_, cell) in enumerate(group.iterrows()):
            owner = next(s for s in series if (s.policy, s.variant) == (cell.policy, cell.variant))
            y = -_CROSS_PT * (row + 0.75) * point
            (mark,) = axes.plot([tokens], [y], marker="x", color=owner.colour, markersize=6.5, markeredgewidth=2.2)
            mark.set_gid(f"failed|{cell.model}|{owner.label}|{cell.failure}")
        text = " ".join(words) if upright else "\n".join(words)
        place = (tokens, -crosses_pt * point)
        axes.annotate(text, place, ha="center", va="top", fontsize=8, rotation=90 * upright, color=style.FAILED)


def failures_text(table: pd.DataFrame) -> str:
    """`; 2 of 12 cells failed (OOM, timeout)`, or nothing."""
    failed = table[table["failure"] != ""]
    if failed.empty:
        return ""
    kinds = ", ".join(sorted({re.sub(r" \d+/\d+$", "", label) for label in failed["failure"]}))
    return f"; {len(failed)} of {plural(len(table), 'cell')} failed ({kinds})"


@dataclass(frozen=True, slots=True)
class Beside:
    """What ran beside the parts of a bar: from where, for how long, and the last part of it that the others waited for."""

    begin: float
    length: float
    waited: float


def bars(
    axes: Axes,
    labels: Sequence[str],
    stacks: dict[str, Sequence[float]],
    colours: dict[str, str],
    notes: Sequence[str],
    beside: Sequence[Beside | None] = (),
) -> None:
    """Horizontal stacked bars, the first on top, with a note at each end. Values must not be negative. beside: a thin bar below
    each, `style.UPDATE`, hatched where it was waited for."""
    left = np.zeros(len(labels))
    thin = 0.2 if any(beside) else 0.0
    places = np.arange(len(labels)) - thin / 2
    for name, values in stacks.items():
        widths = np.nan_to_num(np.asarray(values, dtype=float))
        drawn = axes.barh(places, widths, left=left, height=0.72 - thin, color=colours[name], label=name)
        for patch, label in zip(drawn, labels, strict=True):
            patch.set_gid(f"{label}|{name}")
        left = left + widths
    for place, label, one in zip(places, labels, beside, strict=False):
        if one:
            _thin_bar(axes, place + (0.72 - thin) / 2, thin, label, one)
    widest = max([*left, *(one.begin + one.length for one in beside if one)], default=0.0)
    # Leave room for the longest note beside the longest bar.
    width_pt = 72 * style.WIDTH_IN - 5.6 * max(map(len, labels)) - 20
    room = (5.4 * max(map(len, notes)) + 8) / max(width_pt, 100)
    axes.set_xlim(0, (widest or 1.0) / max(1 - room, 0.4))
    for place, end, note in zip(places, left, notes, strict=True):
        failed = bool(note) and end == 0
        axes.annotate(
            note,
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=style.FAILED if failed else "#222222",
        )
    axes.set_yticks(places, labels, fontsize=9.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")


def _thin_bar(axes: Axes, top: float, height: float, label: str, one: Beside) -> None:
    free = max(one.length - one.waited, 0.0)
    for name, begin, width, hatch in (
        ("update", one.begin, free, None),
        ("update waited for", one.begin + free, one.length - free, HATCH),
    ):
        face = style.UPDATE if hatch is None else "white"
        (patch,) = axes.barh(
            top + height / 2, width, left=begin, height=height, color=face, edgecolor=style.UPDATE, hatch=hatch
        )
        patch.set(linewidth=0.6, gid=f"{label}|{name}")


def bar_panels(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, cells) of each panel of bars: all cells if they fit, else those of the longest lengths, as the title says."""
    panels = panels_of(table)[:MAX_PANELS]
    most = max(_LEAST_BARS, MAX_BARS // max(len(panels), 1))
    return [(title + remark, kept) for title, part in panels for kept, remark in [_longest(part, most)]]


def _longest(part: pd.DataFrame, most: int) -> tuple[pd.DataFrame, str]:
    if len(part) <= most:
        return part, ""
    kept = part[part["seq_len_tokens"] == part["seq_len_tokens"].max()]
    for tokens in sorted(part["seq_len_tokens"].unique(), reverse=True)[1:]:
        more = part[part["seq_len_tokens"] >= tokens]
        if len(more) > most:
            break
        kept = more
    count = kept["seq_len_tokens"].nunique()
    lengths = "longest length" if count == 1 else f"the {count} longest lengths"
    first = "" if len(kept) <= 2 * most else f", first {2 * most} of {len(kept)}"
    return kept.iloc[: 2 * most], f" ({lengths}{first})"


def bar_figure(counts: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure with one panel above another, each as high as its bars need."""
    heights = [0.30 * count + 0.75 for count in counts]
    figure = Figure(figsize=(style.WIDTH_IN, sum(heights) + 0.3))
    axes = figure.subplots(len(counts), 1, squeeze=False, height_ratios=heights).ravel()
    return figure, list(axes)


def bar_label(cell: Any, series: Sequence[Series]) -> str:
    """`4k bind_0`: the length, and the series if there are several, in up to two lines."""
    name = style.length(cell.seq_len_tokens)
    if len(series) == 1:
        return name
    owner = next(s for s in series if (s.policy, s.variant) == (cell.policy, cell.variant))
    return textwrap.fill(f"{name} {owner.label}", 44, max_lines=2, placeholder=" ...")
