"""A sample as lines of text, for a terminal at least 60 columns wide."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from ldft.monitor.processes import Parent
from ldft.monitor.samples import NodeUse, RankUse, RunUse, Sample
from ldft.terminal import plural

GIB = 1 << 30
_BARS = "▁▂▃▄▅▆▇█"
# For output that has no such characters.
_IN_ASCII = str.maketrans(_BARS + "…", "12345678~")
_HISTORY = 60
# The age of a memory reading is shown if it exceeds this.
_OLD_S = 2.0


class History:
    """Memory used on each node in the last samples."""

    def __init__(self) -> None:
        self._used: dict[int, deque[float]] = {}

    def add(self, sample: Sample) -> None:
        for node in sample.nodes:
            used = self._used.setdefault(node.node, deque(maxlen=_HISTORY))
            used.append(node.used / node.total)

    def line(self, node: int, width: int) -> str:
        """The newest samples, one character each, from empty (no memory used) to full (all used)."""
        newest = list(self._used.get(node, ()))[-width:] if width > 0 else []
        return "".join(_BARS[min(len(_BARS) - 1, int(used * len(_BARS)))] for used in newest)


def lines(sample: Sample, parents: Sequence[Parent], history: History, width: int) -> list[str]:
    """The lines on the terminal: the nodes, then each run. No line is longer than `width` characters."""
    text = [time.strftime("%H:%M:%S", time.localtime(sample.time)) + "  sizes in GiB"]
    text += _nodes(sample.nodes, history, width)
    for run in sample.runs:
        text += ["", *_run(run, width)]
    for one in parents:
        text += [
            "",
            f"pid {one.pid} of {one.user}: ldft {one.command}",
            "  no ranks now: starting, ending or between runs",
        ]
    if not sample.runs and not parents:
        text += ["", "no run of ldft found; python -m ldft starts one"]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in map(printable, text)]


def printable(line: str) -> str:
    """The line without what a terminal would obey, such as colours and line breaks: other users choose names and commands here."""
    return line if line.isprintable() else "".join(one if one.isprintable() else "?" for one in line)


def in_encoding(lines: Sequence[str], encoding: str) -> list[str]:
    """The lines in characters that the encoding has."""
    text = "\n".join(lines)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_IN_ASCII).encode(encoding, errors="replace").decode(encoding)
    return text.split("\n")


def in_rows(lines: Sequence[str], rows: int) -> list[str]:
    """As many of the first lines as a terminal of so many rows holds, with a last one that says how many it does not hold."""
    if len(lines) <= rows or rows < 1:
        return list(lines)
    more = plural(len(lines) - rows + 1, "more line")
    return [*lines[: rows - 1], f"{more}: enlarge the terminal, or use --once"]


def _gib(size: int | None) -> str:
    """GiB with at most five digits."""
    if size is None:
        return "-"
    value = size / GIB
    if 0 < value < 0.0005:
        return "<.001"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Table rows as lines: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return [
        "  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _nodes(nodes: Sequence[NodeUse], history: History, width: int) -> list[str]:
    huge = any(node.huge_total for node in nodes)
    rows = [["node", "total", "used", "free", "cache", *(["huge"] if huge else [])]]
    for node in nodes:
        pool = f"{_gib(node.huge_total - node.huge_free)}/{_gib(node.huge_total)}" if node.huge_total else "-"
        sizes = [_gib(size) for size in (node.total, node.used, node.free, node.page_cache)]
        rows.append([str(node.node), *sizes, *([pool] if huge else [])])
    table = aligned(rows)
    room = width - max(map(len, table)) - 2
    bars = ["used over time" if room >= 14 else "", *(history.line(node.node, room) for node in nodes)]
    longest = max(map(len, table))
    return [f"{line.ljust(longest)}  {bar}".rstrip() for line, bar in zip(table, bars, strict=True)]


def _run(run: RunUse, width: int) -> list[str]:
    """One run: its phase, its memory by role and node, and each rank."""
    run_id, _, attempt = run.folder.rpartition("/")
    title = run.title or "config not readable"
    speed = f", {run.tokens_per_s:.0f} tokens/s" if run.tokens_per_s is not None else ""
    doing = run.phase_text or "phase not readable"
    if run.phase == "train":
        doing = f"iteration {run.iteration}/{run.iterations}{speed}"
    text = [f"run {run_id.rpartition('/')[2]}/{attempt} of {run.user}: {title}", f"  {doing}"]
    if run.forbidden:
        who = run.user if run.user == "root" else f"{run.user} and root"
        text.append(f"  some figures are readable only by {who}")
    # The ranks first: what a terminal has too few rows for is the end.
    text += ["", *(f"  {line}" for line in _ranks(run.ranks, width - 2))]
    return [*text, "", *(f"  {line}" for line in _by_node(run, width - 2))]


def _by_node(run: RunUse, width: int) -> list[str]:
    """Host memory by node: each role summed over ranks, the rest of the processes, and each rank's total."""
    used = {node for rank in run.ranks for node, size in rank.memory or () if size}
    used |= {use.node for rank in run.ranks for use in rank.roles if use.node is not None and use.size}
    nodes = sorted(used)
    table = _table(run, nodes)
    # If the terminal is too narrow for all nodes, only the total has them all.
    while nodes and max(map(len, table)) > width:
        nodes.pop()
        table = _table(run, nodes)
    left_out = len(used) - len(nodes)
    more = f"{plural(left_out, 'more node')} in the total; widen the terminal to see {'them' if left_out > 1 else 'it'}"
    return [*table, *([more] if left_out else [])]


def _table(run: RunUse, nodes: list[int]) -> list[str]:
    """The lines of `_by_node` with columns for these nodes."""
    sums: dict[str, dict[int | None, int]] = {}
    for use in (use for rank in run.ranks for use in rank.roles):
        of = sums.setdefault(use.role, {})
        of[use.node] = of.get(use.node, 0) + use.size
    rows = [["memory", *(f"node {node}" for node in nodes), "total"]]
    for role, of in sums.items():
        known = None not in of
        rows.append([role, *(_gib(of.get(node, 0)) if known else "?" for node in nodes), _gib(sum(of.values()))])
    if all(rank.memory is not None for rank in run.ranks):
        rows.append(["other", *_rest(run, sums, nodes)])
    for rank in run.ranks:
        of_rank = None if rank.memory is None else dict(rank.memory)
        name = f"rank {'?' if rank.rank is None else rank.rank}"
        age = f" ({rank.memory_age_s:.0f} s ago)" if rank.memory_age_s > _OLD_S else ""
        sizes = [_gib(None if of_rank is None else of_rank.get(node, 0)) for node in nodes]
        rows.append([name + age, *sizes, _gib(rank.resident)])
    return aligned(rows)


def _rest(run: RunUse, sums: dict[str, dict[int | None, int]], nodes: list[int]) -> list[str]:
    """Memory of the processes without role tensors: Python, torch, gradients in transit. Clamped at 0, since memory by role is
    newer than memory by process."""
    resident = sum(rank.resident or 0 for rank in run.ranks)
    total = max(0, resident - sum(size for of in sums.values() for size in of.values()))
    if any(None in of for of in sums.values()):
        return [*("?" for _ in nodes), _gib(total)]
    by_node = []
    for node in nodes:
        here = sum(dict(rank.memory or ()).get(node, 0) for rank in run.ranks)
        by_node.append(_gib(max(0, here - sum(of.get(node, 0) for of in sums.values()))))
    return [*by_node, _gib(total)]


def _ranks(ranks: Sequence[RankUse], width: int) -> list[str]:
    table = aligned(_of_ranks(ranks, "PCIe rx/tx GB/s"))
    # Without these six characters of the title, 60 columns hold all of it.
    return table if max(map(len, table)) <= width else aligned(_of_ranks(ranks, "PCIe GB/s"))


def _of_ranks(ranks: Sequence[RankUse], link_title: str) -> list[list[str]]:
    gpus = any(rank.device for rank in ranks)
    rows = [["rank", "pid", "cores", "pinned", *(["VRAM", "GPU", link_title] if gpus else [])]]
    for rank in ranks:
        cores = "-" if rank.cores_busy is None else f"{rank.cores_busy:.{2 if rank.cores_busy < 99 else 1}f}"
        row = ["?" if rank.rank is None else str(rank.rank), str(rank.pid), cores, _gib(rank.pinned)]
        if (device := rank.device) is not None:
            busy = "-" if device.utilisation_percent is None else f"{device.utilisation_percent}%"
            link = "/".join(map(_rate, (device.pcie_rx_kb_per_s, device.pcie_tx_kb_per_s)))
            row += [f"{_gib(device.vram_used)}/{_gib(device.vram_total)}", busy, link]
        rows.append(row)
    return rows


def _rate(kb_per_s: int | None) -> str:
    """GB/s with at most four characters."""
    if kb_per_s is None:
        return "-"
    rate = kb_per_s / 1e6
    return f"{rate:.1f}" if rate < 99 else f"{rate:.0f}"
