"""Output of a sweep: a live table on a terminal, otherwise one line per cell, and a summary at the end."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldft.errors import ConfigError
from ldft.preflight.resolved import resolve
from ldft.results.history import History, Row
from ldft.runner import checks
from ldft.sweep import cell
from ldft.sweep.plan import Cell, Plan
from ldft.terminal import length, plural, rewrites, seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_GOOD = ("ok", "skipped")
_SHOWN = 12  # finished cells in the live table


def place(row: Row) -> str:
    """The run's memory: by node where known, else the total."""
    nodes: dict[int, float] = {}
    for entry in row.get("nodes") or []:
        nodes[entry["node"]] = nodes.get(entry["node"], 0.0) + (entry["total_gib"] or 0.0)
    used = [f"node{node} {gib:.1f}" for node, gib in sorted(nodes.items()) if gib >= 0.05]
    if used:
        return " ".join(used) + " GiB"
    peak = row.get("peak_host_gib")
    return f"host {peak:.1f} GiB" if peak else ""


def measured(row: Row) -> list[str]:
    """Duration, speed and memory of a run, where available."""
    speed = row.get("tokens_per_s")
    words = [seconds(row["duration_s"]) if row.get("duration_s") else "", f"{speed:.0f} tok/s" if speed else ""]
    return [word for word in [*words, place(row)] if word]


def at_work(report: dict[str, Any], tokens_per_iteration: int) -> str:
    """Phase and speed of a running cell, from its rank 0's reports."""
    times = report.get("iteration_s") or []
    if report.get("phase") == "train" and times:
        return f"iteration {len(times)}, {tokens_per_iteration / times[-1]:.0f} tok/s"
    return str(report.get("phase_text", "starting Python"))


class Clock:
    """Estimates the time left from finished cells: of the same model and length, else of any."""

    def __init__(self) -> None:
        self._took: dict[tuple[str, int], list[float]] = {}

    def add(self, one: Cell, row: Row | None) -> None:
        # Failed and skipped cells say nothing about the duration of a successful cell.
        if row and row["status"] == "ok" and row.get("duration_s"):
            self._took.setdefault((one.model, one.tokens), []).append(row["duration_s"])

    def left(self, cells: list[Cell]) -> str:
        """'ETA 1h12m', or an empty string if no cell has finished."""
        everything = [took for found in self._took.values() for took in found]
        if not cells or not everything:
            return ""
        guess = statistics.mean(everything)
        left_s = sum(statistics.mean(self._took.get((one.model, one.tokens), [guess])) for one in cells)
        return f"ETA {seconds(left_s)}"


def summary(plan: Plan, history: History) -> list[tuple[str, list[list[str]]]]:
    """Titled tables: the best cell of each model and length, then skipped and failed cells with reason and log."""
    speeds: dict[tuple[str, int], dict[str, list[float]]] = {}
    bad, skipped = [], []
    sources: dict[str, int] = {}
    for one in plan.cells:
        row = history.row(one.run_id, history.latest_number(one.run_id))
        if not row:
            continue
        if source := row["source_hash"]:  # none in the row of a job that ended without one: nothing was measured
            sources[source] = sources.get(source, 0) + 1
        if row["status"] == "ok" and row["tokens_per_s"]:
            group = speeds.setdefault((one.model, one.tokens), {})
            group.setdefault(one.label.rpartition(" #")[0] or one.label, []).append(row["tokens_per_s"])
        elif row["status"] == "skipped":
            skipped.append([one.label, row["error_message"] or ""])
        elif row["status"] != "ok":
            log = str(history.results_dir / row["log_path"]) if row["log_path"] else ""
            bad.append([one.label, row["status"], row["error_message"] or "", log])
    best = []
    for (model, tokens), group in sorted(speeds.items()):
        label, speed = max(
            ((label, statistics.median(found)) for label, found in group.items()), key=lambda item: item[1]
        )
        best.append([model, length(tokens), label, f"{speed:.0f} tok/s", f"of {len(group)}"])
    tables = [("best cell of each model and length", best), ("skipped", skipped), ("not ok", bad)]
    if len(sources) > 1:
        mixed = [[source, plural(count, "row")] for source, count in sources.items()]
        tables.append(("rows from different code or config: compare with care", mixed))
    return [(title, lines) for title, lines in tables if lines]


def columns(lines: list[list[str]]) -> list[str]:
    """Table rows as aligned lines of text."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    return ["  ".join(text.ljust(widths[i]) for i, text in enumerate(line)).rstrip() for line in lines]


def counts(plan: Plan, history: History) -> dict[str, int]:
    """Cells of the plan by the status of their newest row; 'missing' for those without one."""
    found: dict[str, int] = {}
    for one in plan.cells:
        row = history.row(one.run_id, history.latest_number(one.run_id))
        status = row["status"] if row else "missing"
        found[status] = found.get(status, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (item[0] != "ok", item[0] == "missing", item[0])))


def counted(numbers: dict[str, int]) -> str:
    """'5 ok, 1 error'."""
    return ", ".join(f"{number} {status}" for status, number in numbers.items())


class View:
    """Displays a sweep that this process runs."""

    def __init__(self, plan: Plan, results_dir: Path) -> None:
        self._plan = plan
        self._results_dir = results_dir
        self._total = len(plan.cells)
        self._clock = Clock()
        self._open: list[Cell] = list(plan.cells)
        self._finished: list[list[str]] = []
        self._tally: dict[str, int] = {}
        self._now: tuple[int, Cell, float] | None = None
        self._live: Live | None = None
        self._left_elsewhere: set[str] = set()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        if self._live:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def start(self, history: History, num_todo: int, *, elsewhere: bool = False) -> None:
        """Print what the sweep runs, and notes that concern all its cells. elsewhere: cells run on other machines."""
        kept = self._total - num_todo
        known = f", {kept} already have rows ({counted(counts(self._plan, history))})" if kept else ""
        self.say(f"ldft: sweep {self._plan.name}: {plural(self._total, 'cell')}{known}; results in {self._results_dir}")
        for path, problem in history.unreadable.items():
            self.say(f"ldft: skipped unreadable {path}: {problem}")
        configs = self._plan.configs.values()
        for line in dict.fromkeys(line for one in configs for line in checks.resolutions(one)):
            self.say(f"ldft: {line}")
        # The warnings depend on these keys only.
        kinds = {(one.model.name, one.launch.num_ranks, one.train.precision): one for one in configs}
        for config in kinds.values() if not elsewhere else ():
            with contextlib.suppress(ConfigError):  # a refused cell records this in its row
                for warning in checks.warnings(resolve(config)):
                    self.say(f"ldft: warning: {config.model.name}: {warning}")
        for one in self._plan.cells:
            row = history.row(one.run_id, history.latest_number(one.run_id))
            self._clock.add(one, row)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show a live table on a terminal."""
        if not rewrites():
            yield
            return
        from rich.live import Live

        with Live(auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as self._live:
            yield
            self._now = None
            self.show({})
        self._live = None

    def begin(self, index: int, one: Cell) -> None:
        self._now = (index, one, time.monotonic())
        self.show({})

    def show(self, report: dict[str, Any]) -> None:
        """Update the display; called about ten times per second while a cell runs."""
        if self._live:
            self._live.update(self._table(report), refresh=True)

    def _table(self, report: dict[str, Any]) -> RenderableType:
        from rich.table import Table

        left = self._clock.left(self._open)
        table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
        table.title = f"{self._plan.name}  " + "  ".join(
            word for word in (counted(self._tally), f"{len(self._open)} to go", left) if word
        )
        for _ in range(4):
            table.add_column(overflow="fold")
        for line in self._finished[-_SHOWN:]:
            table.add_row(*line, style=None if line[2] in _GOOD else "red")
        if self._now:
            index, one, since = self._now
            text = at_work(report, one.tokens_per_iteration)
            table.add_row(
                f"[{index + 1}/{self._total}]", one.label, "running", f"{text} [{seconds(time.monotonic() - since)}]"
            )
        return table

    def finish(self, index: int, one: Cell, done: cell.Done) -> None:
        """Record that a cell has its row, or that another process runs it."""
        self._now = None
        if done.row is None:
            self._left_elsewhere.add(one.run_id)
            status, words = "runs elsewhere", []
        else:
            self._left_elsewhere.discard(one.run_id)
            status = done.row["status"]
            words = measured(done.row) if done.do is cell.Do.run else []
            if status != "ok":
                words.append(done.row.get("error_message") or "")
            self._clock.add(one, done.row if done.do is cell.Do.run else None)
            self._tally[status] = self._tally.get(status, 0) + 1
        self._open = [other for other in self._open if other is not one]
        text = " ".join(words)
        self._finished.append([f"[{index + 1}/{self._total}]", one.label, status, text])
        if not self._live:
            print(" ".join(x for x in (*self._finished[-1], self._clock.left(self._open)) if x), flush=True)

    def end(self, history: History, told_to_stop: str | None) -> int:
        """Print the summary. Returns the exit code: 0 all ok or skipped (or running elsewhere), 130 told to stop, else 1."""
        for line in report_lines(self._plan, history):
            self.say(line)
        if told_to_stop:
            self.say(f"ldft: stopped by {told_to_stop}; rerun the same command to resume")
            return 130
        numbers = counts(self._plan, history)
        running = sum(
            1
            for one in self._plan.cells
            if one.run_id in self._left_elsewhere and not history.latest_number(one.run_id)
        )
        bad = sum(number for status, number in numbers.items() if status not in _GOOD) - running
        if running:
            self.say(
                f"ldft: running elsewhere: {plural(running, 'cell')}; see python -m ldft.status {self._results_dir}"
            )
        return 1 if bad > 0 else 0


def report_lines(plan: Plan, history: History) -> list[str]:
    """The summary lines of a sweep, for the sweep itself and for ldft.status."""
    lines = []
    for title, table in summary(plan, history):
        lines += [f"{title}:", *(f"  {line}" for line in columns(table))]
    return [*lines, f"ldft: sweep {plan.name}: {plural(len(plan.cells), 'cell')}: {counted(counts(plan, history))}"]
