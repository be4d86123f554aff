"""Common style of all figures: sizes, colours, markers, length axes, and reproducible files from the same rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Colours of Paul Tol's "muted" scheme (distinct with common colour blindness) and black. Each policy has its own
# marker, so that policies are distinct in greyscale too, and looks the same in every figure.
POLICIES = {
    "default": ("#000000", "o"),
    "bind_0": ("#332288", "s"),
    "local_only": ("#88CCEE", "D"),
    "interleave_0_3": ("#DDCC77", "^"),
    "interleave_all": ("#999933", "v"),
    "naive_interleaving": ("#CC6677", "<"),
    "weighted_0_3": ("#AA4499", "P"),
    "roles_0_3": ("#882255", "X"),
    "cxl_aware": ("#117733", ">"),
    "striped": ("#44AA99", "p"),
    "optimal": ("#D55E00", "*"),
}
# For everything except policies (Okabe and Ito's scheme).
OTHERS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*"]
LINES = ["-", "--", ":", "-."]

PHASES = {"forward": "#56B4E9", "backward": "#0072B2", "step": "#E69F00", "other": "#BBBBBB"}
UPDATE = "#D55E00"  # the update, where it is drawn beside the phases
ROLES = {
    "master_weights": "#332288",
    "master_gradients": "#88CCEE",
    "momentum": "#44AA99",
    "variance": "#117733",
    "compute_weights": "#DDCC77",
    "compute_gradients": "#CC6677",
    "activations": "#AA4499",
    "other": "#BBBBBB",
}
NODES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]

FAILED = "#B00020"
WIDTH_IN = 7.0

_RC: dict[str, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.hashsalt": "ldft",
    "svg.fonttype": "path",
}


@contextmanager
def styled() -> Iterator[None]:
    """A context for drawing with this style; the caller's matplotlib settings stay unchanged."""
    with mpl.rc_context(_RC):
        yield


def policy_style(policy: str) -> tuple[str, str]:
    """(colour, marker) of a policy, by name alone. Overridden keys (`weighted_0_3 weights=[3,1]`) keep the colour."""
    name = policy.split(" ")[0]
    known = POLICIES.get(name)  # `default: ...` inherited from numactl is not the default policy
    if known and name == policy:
        return known
    place = zlib.crc32(policy.encode())
    colour = known[0] if known else OTHERS[place % len(OTHERS)]
    return colour, MARKERS[place % len(MARKERS)]


def node_colour(node: int) -> str:
    return NODES[int(node) % len(NODES)]


def length(tokens: float) -> str:
    """4096 -> 4k, 1048576 -> 1M; lengths in thousands stay as they are (128000 would read 125k)."""
    whole = int(tokens)
    if whole % 1000 == 0:
        return str(whole)
    if whole >= 2**20 and whole % 2**20 == 0:
        return f"{whole // 2**20}M"
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def number(value: float) -> str:
    """A number for a title or a bar: three significant digits, thousands as k."""
    if abs(value) >= 99_950:
        return f"{value / 1000:.0f}k"
    if abs(value) >= 9_995:
        return f"{value / 1000:.1f}k"
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"


def length_axis(axes: Axes, lengths: list[int]) -> None:
    """A log2 axis with a tick at each length that was run (every second one if there are many)."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(lengths))
    while len(ticks) > 7:
        ticks = ticks[::2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
    axes.set_xlim(min(lengths) / 1.5, max(lengths) * 1.5)
    axes.set_xlabel("sequence length (tokens)")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg, without dates, so that the same rows give the same bytes. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with styled():
        figure.savefig(paths[0], metadata={"Software": None})
        figure.set_layout_engine("none")  # the layout is computed once: the SVG is the same picture, at half the work
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths
