"""`python -m ldft.monitor`: current memory of the machine's NUMA nodes and of the runs on it.

    python -m ldft.monitor                      # live in the terminal, until Ctrl-C
    python -m ldft.monitor --once               # one table
    python -m ldft.monitor --json               # one JSON object per sample, one per line, for other tools
    python -m ldft.monitor --pid 1234           # any process, in numastat's categories

Reads /proc, sysfs, the runs' own reports and NVML; needs no root and interrupts no process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldft import closed_pipe, files, proc
from ldft.errors import ConfigError
from ldft.memory.probe import CATEGORIES, MIB, MemoryTable, process_memory
from ldft.monitor import processes, view
from ldft.monitor.sampler import SHARE, Pace, Sampler
from ldft.monitor.samples import Sample
from ldft.terminal import Parser, rewrites

_SHORTEST_S, _LONGEST_S = 0.05, 86_400.0
# The kernel's own limit.
_LARGEST_PID = 1 << 22
_BETWEEN_TWO_S = 0.3
_UNREADABLE = "cannot be read: it ended, or belongs to another user"
# Fraction of one core. With --pid nothing else is read.
SHARE_OF_PROCESSES = 0.008


class Watch:
    """The runs on this machine, sample by sample."""

    def __init__(self, results: Path | None) -> None:
        self._results = results
        self._sampler = Sampler()
        self._pace = Pace()
        self._runs: list[processes.Run] = []
        self.parents: list[processes.Parent] = []
        """ldft commands that have no ranks at present."""

    def sample(self) -> Sample:
        """The current state. New runs appear at the next search of /proc, which is repeated as often as its cost allows."""
        if self._pace.is_due(SHARE):
            with self._pace.reading():
                self._runs, self.parents = processes.find(self._results)
        self.parents = [one for one in self.parents if proc.stat(one.pid)]
        return self._sampler.sample(self._runs)


def as_json(sample: Sample, parents: list[processes.Parent]) -> dict[str, Any]:
    """A sample as plain data: sizes in bytes, times in seconds."""
    plain = dataclasses.asdict(sample)
    for node, use in zip(plain["nodes"], sample.nodes, strict=True):
        node["used"] = use.used
    for run in plain["runs"]:
        for rank in run["ranks"]:
            if rank["memory"] is not None:
                rank["memory"] = [{"node": node, "size": size} for node, size in rank["memory"]]
    plain["without_ranks"] = [
        {"pid": one.pid, "user": one.user, "command": one.command, "results_dir": one.results_dir and str(one.results_dir)}
        for one in parents
    ]  # fmt: skip
    return plain


def _table_as_json(table: MemoryTable) -> dict[str, Any]:
    def sizes(node: int) -> dict[str, int]:
        memory = table.nodes[node]
        return {name: getattr(memory, name) for name in (*CATEGORIES, "total")}

    nodes = [{"node": node, **sizes(node)} for node in sorted(table.nodes)]
    return {"time": time.time(), "pids": table.pids, "missing": table.missing, "nodes": nodes}


def _moments(interval_s: float, once: bool) -> Iterator[None]:
    """Yield now, and then every `interval_s` seconds; missed times are skipped."""
    due = time.monotonic()
    while True:
        yield
        if once:
            return
        due = max(due + interval_s, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _of_runs(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The lines of each sample of the machine and its runs."""
    watch, history = Watch(arguments.results), view.History()
    if arguments.once:  # CPU use needs a second sample
        watch.sample()
        time.sleep(_BETWEEN_TWO_S)
    for _ in _moments(arguments.interval, arguments.once):
        sample = watch.sample()
        if arguments.json:
            yield [json.dumps(as_json(sample, watch.parents))]
        else:
            history.add(sample)
            yield view.lines(sample, watch.parents, history, _size()[0])


def _of_processes(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The lines of each sample of processes, until all have ended. Large processes are read less often than requested."""
    pace = Pace()
    for _ in _moments(arguments.interval, arguments.once):
        if not any(map(proc.stat, arguments.pid)):  # a zombie process would still have an empty table
            return
        if not pace.is_due(SHARE_OF_PROCESSES):
            continue
        with pace.reading():
            table = process_memory(arguments.pid)
        if not table.pids:
            return
        missing = [f"ldft: process {pid} {_UNREADABLE}" for pid in table.missing]
        table.names = [view.printable(name) for name in table.names]
        yield [json.dumps(_table_as_json(table))] if arguments.json else [*table.render(MIB).splitlines(), *missing]


def _size() -> tuple[int, int]:
    """The terminal's current columns and rows; 100 columns for a file, and no limit of rows."""
    if not sys.stdout.isatty():
        return 100, sys.maxsize
    size = os.get_terminal_size(sys.stdout.fileno())
    return size.columns or 80, size.lines or 24  # 0: a terminal that does not know


def _show_live(blocks: Iterable[list[str]]) -> None:
    """Show the blocks on the terminal, each replacing the previous one; the last one stays."""
    from rich.live import Live
    from rich.text import Text

    for name in ("COLUMNS", "LINES"):  # rich would believe them, although they may be out of date
        os.environ.pop(name, None)
    with Live(auto_refresh=False, redirect_stdout=False, redirect_stderr=False, vertical_overflow="crop") as live:
        for block in blocks:
            shown = view.in_rows(block, _size()[1])
            # Plain lines, not a rich table, whose layout takes fifty times as long.
            live.update(Text("\n".join(shown), no_wrap=True, overflow="ellipsis"), refresh=True)


def _print(blocks: Iterable[list[str]], between: str) -> None:
    """Print the blocks one after the other, for a file or a pipe."""
    for number, block in enumerate(blocks):
        print((between if number else "") + "\n".join(block), flush=True)


def _arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m ldft.monitor", description="Show memory by NUMA node, and the runs that use it, live."
    )
    parser.add_argument("--once", action="store_true", help="show one sample and exit")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line and sample; sizes in bytes")
    parser.add_argument("--pid", type=int, action="append", help="watch this process instead; may be repeated")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="time between samples (default: 1)"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="show only runs of this results folder")
    arguments = parser.parse_args()
    if not _SHORTEST_S <= arguments.interval <= _LONGEST_S:
        allowed = f"use {_SHORTEST_S} to {_LONGEST_S:.0f} seconds"
        parser.error(f"--interval: {arguments.interval:g} is not possible; {allowed}")
    for pid in arguments.pid or ():
        if not 0 < pid <= _LARGEST_PID:
            parser.error(f"--pid: {pid} is no process id; use 1 to {_LARGEST_PID}, as ps shows them")
    if arguments.results:
        try:
            arguments.results = files.named(arguments.results, "--results")
        except ConfigError as error:
            parser.error(str(error))
        if not arguments.results.is_dir():
            parser.error(f"--results: {arguments.results} is not a folder; name the results.dir of a run")
    if arguments.pid and arguments.results:
        parser.error("--results: cannot be combined with --pid, which watches any process; leave one of them out")
    return arguments


def _show(arguments: argparse.Namespace) -> int:
    if arguments.pid and not process_memory(arguments.pid).pids:
        for pid in arguments.pid:
            print(f"ldft: process {pid} {_UNREADABLE}", file=sys.stderr)
        return 1
    blocks = _of_processes(arguments) if arguments.pid else _of_runs(arguments)
    blocks = (view.in_encoding(block, sys.stdout.encoding or "utf-8") for block in blocks)
    if rewrites() and not arguments.once and not arguments.json:
        _show_live(blocks)
    else:
        _print(blocks, between="" if arguments.json else "\n")
    return 0


def _end(number: int, _: object) -> None:
    """Leave as after Ctrl-C: the terminal gets its cursor back."""
    sys.exit(128 + number)


@closed_pipe.stop
def main() -> int:
    """Returns the exit code: 0; 1 if none of the given processes can be read; 2 for invalid arguments; 130 after Ctrl-C, and like
    it 128 and the signal's number after SIGTERM and SIGHUP."""
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        return _show(arguments)
    except KeyboardInterrupt:
        return 130
