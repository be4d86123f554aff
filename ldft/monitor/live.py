"""`python -m ldft.monitor`: memory of the machine's NUMA nodes, and of the runs that work on it, as they are now.

    python -m ldft.monitor                      # live in the terminal, until Ctrl-C
    python -m ldft.monitor --once               # one table
    python -m ldft.monitor --json               # one JSON object a sample and line, for other tools
    python -m ldft.monitor --pid 1234           # any process, in numastat's categories

Reads /proc, sysfs, the runs' own reports and NVML; needs no root, and stops nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldft.memory.probe import CATEGORIES, MIB, MemoryTable, process_memory
from ldft.monitor import processes, view
from ldft.monitor.sampler import SHARE, Pace, Sampler
from ldft.monitor.samples import Sample
from ldft.terminal import Parser

# Another program that reads our output has gone: what a shell shows for that.
_PIPE_CLOSED = 141
_SHORTEST_S = 0.05
_BETWEEN_TWO_S = 0.3
_UNREADABLE = "cannot be read: it ended, or belongs to another user"
# Of one core. Nothing else is read with --pid.
SHARE_OF_PROCESSES = 0.008


class Watch:
    """The runs on this machine, sample by sample."""

    def __init__(self, results: Path | None) -> None:
        self._results = results
        self._sampler = Sampler()
        self._pace = Pace()
        self._runs: list[processes.Run] = []
        self.parents: list[processes.Parent] = []
        """Commands that have no ranks now."""

    def sample(self) -> Sample:
        """Everything now. Runs that begin are seen when /proc was searched again, which is done as often as its cost allows."""
        if self._pace.is_due(SHARE):
            with self._pace.reading():
                self._runs, self.parents = processes.find(self._results)
        self.parents = [one for one in self.parents if processes.stat(one.pid)]
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
    """Now, and then every `interval_s`; moments that were missed are not made up for."""
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
    if arguments.once:  # CPU use is known from a second sample on
        watch.sample()
        time.sleep(_BETWEEN_TWO_S)
    for _ in _moments(arguments.interval, arguments.once):
        sample = watch.sample()
        if arguments.json:
            yield [json.dumps(as_json(sample, watch.parents))]
        else:
            history.add(sample)
            yield view.lines(sample, watch.parents, history, _width())


def _of_processes(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The lines of each sample of processes, until the last of them has ended. Large ones are read less often than asked for."""
    pace = Pace()
    for _ in _moments(arguments.interval, arguments.once):
        if not any(
            map(processes.stat, arguments.pid)
        ):  # one that nobody has waited for would still have an empty table
            return
        if not pace.is_due(SHARE_OF_PROCESSES):
            continue
        with pace.reading():
            table = process_memory(arguments.pid)
        if not table.pids:
            return
        missing = [f"ldft: process {pid} {_UNREADABLE}" for pid in table.missing]
        yield [json.dumps(_table_as_json(table))] if arguments.json else [*table.render(MIB).splitlines(), *missing]


def _width() -> int:
    """Of the terminal as it is now, whatever COLUMNS said when it was opened. A file has none: 100."""
    return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 100


def _show_live(blocks: Iterable[list[str]]) -> None:
    """On the terminal, in place; the last one stays there."""
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, redirect_stdout=False, redirect_stderr=False, vertical_overflow="crop") as live:
        for block in blocks:
            # Lines of ours, not a table of rich's, which takes fifty times as long to lay out.
            live.update(Text("\n".join(block), no_wrap=True, overflow="ellipsis"), refresh=True)


def _print(blocks: Iterable[list[str]], between: str) -> None:
    """One after the other, for a file or a pipe."""
    for number, block in enumerate(blocks):
        print((between if number else "") + "\n".join(block), flush=True)


def _arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m ldft.monitor", description="Show memory by NUMA node, and the runs that use it, live."
    )
    parser.add_argument("--once", action="store_true", help="show one sample and end")
    parser.add_argument("--json", action="store_true", help="one JSON object a sample and line; sizes in bytes")
    parser.add_argument("--pid", type=int, action="append", help="watch this process instead; may be repeated")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="from sample to sample (1)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="only runs of this results folder")
    arguments = parser.parse_args()
    if not _SHORTEST_S <= arguments.interval < float("inf"):
        parser.error(
            f"--interval: {arguments.interval:g} is no time between samples; use {_SHORTEST_S} seconds or more"
        )
    if arguments.results and not arguments.results.is_dir():
        parser.error(f"--results: {arguments.results} is not a folder; name the results.dir of a run")
    if arguments.pid and arguments.results:
        parser.error("--results: --pid watches a process, of whatever folder; leave one of both out")
    return arguments


def _show(arguments: argparse.Namespace) -> int:
    if arguments.pid and not process_memory(arguments.pid).pids:
        for pid in arguments.pid:
            print(f"ldft: process {pid} {_UNREADABLE}", file=sys.stderr)
        return 1
    blocks = _of_processes(arguments) if arguments.pid else _of_runs(arguments)
    if sys.stdout.isatty() and not arguments.once and not arguments.json:
        _show_live(blocks)
    else:
        _print(blocks, between="" if arguments.json else "\n")
    return 0


def main() -> int:
    """Returns the exit code: 0; 1 where no process named can be read; 2 for wrong arguments; 130 after Ctrl-C."""
    arguments = _arguments()
    try:
        return _show(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # | head: the interpreter must not complain about it at its end either
        with contextlib.suppress(BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
