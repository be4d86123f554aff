"""Whole runs: `python -m ldft` itself in the emulated machine. All of them in one boot, each judged by one test on the host.

To add one, write a module like runs_process.py, name it in MODULES, and that is all:

    RUNS = Runs()

    @RUNS.add("roles_0_3", "numa=roles_0_3")                          # a name, then overrides for the command line
    def roles_0_3(row, seen):                                         # on the host, with what the run left
        assert row["numa_mechanism"] == "..."                         # its row, read back from the results folder
        assert seen.policies["prefer=static:3"] == {3: 12800}         # what a watcher in there read in its numa_maps

    @RUNS.add("under_numactl", before=("numactl", "--interleave=1,2"))  # what stands before `python -m ldft`

    @RUNS.add("weighted_0_3", "numa=weighted_0_3", base_pages=True)   # without transparent huge pages, for shares of all memory

A run takes 2 to 4 minutes in there, most of it imports, so add few. The guest imports these modules for the names and commands
alone: nothing heavy at their top (pytest, numpy, ldft.results go into the functions).

Guest side: `python -m numa_vm.whole FOLDER NAME...` starts the runs one after the other and watches each one's worker from
outside, with reader.py, which shares no code with ldft. FOLDER/NAME is the results folder, FOLDER/NAME.json what was seen.

Results are written to the guest's RAM and copied to FOLDER when the run has ended. Not because it is faster: reading a file of
the written-through folder in the moment in which it is replaced can hang for good. QEMU's 9p server asks for a size by path and
gets the new file's, while the descriptor reads the old one, and Linux 6.12 (fs/netfs) asks for the missing bytes again and
again. A parent of ldft reads its ranks' reports while they are rewritten.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .reader import Reader, integers

MODULES = ["runs_process", "runs_roles"]
SMALL = ("model=nano", "seq_len.tokens=16", "train.iterations=3", "train.warmup_iterations=1")
# A run takes 3 to 4 minutes on two idle cores, 8 on busy ones.
LIMIT_S = 1200


@dataclass(kw_only=True, slots=True)
class Seen:
    """What the watcher read in the guest: base pages of anonymous memory of the worker, by node."""

    status: int | None = None
    """Exit status of `python -m ldft`; None when its time was up."""
    seconds: float = 0.0
    first: dict[int, int] = field(default_factory=dict)
    """The first reading after the worker has set its policy."""
    last: dict[int, int] = field(default_factory=dict)
    """The last reading, while the worker was whole."""
    policies: dict[str, dict[int, int]] = field(default_factory=dict)
    """The last reading by the policy of the mapping, as numa_maps writes it; a mapping without one has that of the process."""
    roles: dict[str, dict[int, int]] = field(default_factory=dict)
    """The last reading of DeepSpeed's tensors by role, at the addresses that the worker reported."""
    mapped: dict[str, list[str]] = field(default_factory=dict)
    """Policies of the mappings that they lie in, as numa_maps writes them."""
    collapsed: int = 0
    """Huge pages that khugepaged put together meanwhile, in the whole machine."""
    monitored: list[dict[str, Any]] = field(default_factory=list)
    """What `python -m ldft.monitor --json` said beside the run, of the samples with its rank; empty where it was not asked for."""
    once: str = ""
    """What `python -m ldft.monitor --once` showed, in the same case."""
    folder: str = ""
    """The results folder, on the host."""

    def added(self) -> dict[int, int]:
        return {node: max(0, pages - self.first.get(node, 0)) for node, pages in self.last.items()}


Check = Callable[[Any, Seen], None]


@dataclass(kw_only=True, slots=True)
class Run:
    """One `python -m ldft` and what must come of it."""

    overrides: tuple[str, ...]
    before: tuple[str, ...]
    check: Check
    base_pages: bool = False
    """The guest makes no transparent huge pages while it lasts."""
    monitored: bool = False
    """Beside it runs ldft.monitor."""


class Runs(dict[str, Run]):
    """Runs by name, in the order in which they are made."""

    def add(
        self,
        name: str,
        *overrides: str,
        before: tuple[str, ...] = (),
        base_pages: bool = False,
        monitored: bool = False,
    ) -> Callable[[Check], Check]:
        """Decorator: a run of this name, which the function judges by its row and by what was seen."""

        def register(check: Check) -> Check:
            assert name not in self, name
            self[name] = Run(
                overrides=overrides, before=before, check=check, base_pages=base_pages, monitored=monitored
            )
            return check

        return register


def all_runs() -> Runs:
    runs = Runs()
    for module in MODULES:
        for name, run in importlib.import_module(f"numa_vm.{module}").RUNS.items():
            assert name not in runs, name
            runs[name] = run
    return runs


def load(path: Path) -> Seen:
    """What `watch` left, on the host."""
    read = json.loads(path.read_text())
    nodes = {name: integers(read[name]) for name in ("first", "last")}
    named = {kind: {name: integers(pages) for name, pages in read[kind].items()} for kind in ("policies", "roles")}
    return Seen(**{**read, **nodes, **named, "folder": str(path.with_suffix(""))})


def worker() -> int | None:
    """The process that trains, if there is one now."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"\0ldft.worker\0" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return None


def collapsed() -> int:
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("thp_collapse_alloc "))


def report(results: Path) -> dict[str, Any]:
    """What the worker has said of itself by now."""
    path = next(results.glob("*/*/rank-0.json"), None)
    return json.loads(path.read_text()) if path else {}


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """The process does nothing within the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def look_at_roles(ask: Reader, pid: int, results: Path, seen: Seen) -> None:
    """Where DeepSpeed's tensors are now, if the worker has said by now which they are and has not begun to free them.

    Meanwhile it stands still: a fast machine trains in less time than it takes to read them all.
    """
    with suppress(ProcessLookupError, RuntimeError), standing_still(pid):  # either: it has ended by itself
        said = report(results)
        if said.get("phase") == "teardown":
            return
        for role, tensors in said.get("role_addresses", {}).items():
            reading = ask(pid, [(address, size) for _, address, size in tensors])
            nodes = sorted({node for found in reading["exact_nodes"] for node in found})
            seen.roles[role] = {node: sum(found.get(node, 0) for found in reading["exact_nodes"]) for node in nodes}
            seen.mapped[role] = reading["policies"]


@contextmanager
def monitoring(seen: Seen, wanted: bool) -> Iterator[None]:
    """ldft.monitor beside the block, if it is wanted."""
    if not wanted:
        yield
        return
    command = [sys.executable, "-m", "ldft.monitor"]
    with tempfile.TemporaryFile("w+") as file:
        monitor = subprocess.Popen([*command, "--json", "--interval", "2"], stdout=file)
        yield
        monitor.terminate()
        monitor.wait()
        file.seek(0)
        samples = [json.loads(line) for line in file if line.endswith("\n")]
    seen.monitored = [sample for sample in samples if sample["runs"]]
    seen.once = subprocess.run([*command, "--once"], capture_output=True, text=True, check=True).stdout


@contextmanager
def huge_pages(wanted: bool) -> Iterator[None]:
    """The guest's transparent huge pages as they are, or none within the block."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    before = setting.read_text().partition("[")[2].partition("]")[0]
    if not wanted:
        setting.write_text("never")
    yield
    setting.write_text(before)


def watch(words: list[str], results: Path) -> Seen:
    """Runs a command and looks at its worker until it ends. What the worker has before its first report was there, or on its
    way, before it could set a policy."""
    ask, seen = Reader(), Seen()
    began, before = time.monotonic(), collapsed()
    run = subprocess.Popen(words)
    next_s = 0.0
    while run.poll() is None:
        if time.monotonic() - began > LIMIT_S:
            run.terminate()  # ldft ends its worker and leaves a row
            run.wait()
            return seen
        if (pid := worker()) is not None and (said := report(results)):
            if not seen.roles and "role_addresses" in said:
                next_s = 0.0  # not a moment later: training may last no longer
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + 2
                try:
                    reading = ask(pid, [])
                except RuntimeError:  # it ended while it was read
                    continue
                nodes = reading["anonymous_nodes"]
                if sum(nodes.values()) > sum(seen.last.values()) / 2:  # not the remains of a process that is ending
                    seen.first, seen.last, seen.policies = seen.first or nodes, nodes, reading["anonymous_policies"]
                look_at_roles(ask, pid, results, seen)
        time.sleep(0.2)
    seen.status, seen.seconds, seen.collapsed = run.returncode, time.monotonic() - began, collapsed() - before
    return seen


def main(folder: Path, wanted: list[str]) -> None:
    for name in wanted:
        run = all_runs()[name]
        results = Path(tempfile.mkdtemp()) / name
        words = [*run.before, sys.executable, "-m", "ldft", *SMALL, *run.overrides, f"results.dir={results}"]
        print(f"numa-vm: whole run {name}: {' '.join(words)}", flush=True)
        about = Seen()
        with huge_pages(not run.base_pages), monitoring(about, run.monitored):
            seen = watch(words, results)
        seen.monitored, seen.once = about.monitored, about.once
        if results.exists():
            shutil.copytree(results, folder / name)
        fresh = folder / f"{name}.new"
        fresh.write_text(json.dumps(asdict(seen)))
        fresh.replace(folder / f"{name}.json")
        print(f"numa-vm: whole run {name}: exit status {seen.status} after {seen.seconds:.0f} s", flush=True)
        os.sync()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
