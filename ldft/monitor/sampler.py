"""Samples active runs from outside their processes, for the live monitor and for a run's trace.

Cheap readings (the ranks' reports, CPU time, memory of the nodes) are made for every sample. Expensive ones (a process's numa_maps,
for which the kernel walks its page tables; NVML's PCIe counters) are made as often as a small fraction of one core allows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldft.memory.probe import process_memory
from ldft.memory.topology import SYSFS, node_meminfo, parse_list, read_meminfo
from ldft.monitor.gpu_use import Gpus
from ldft.monitor.processes import Run, rank_of, ticks_of_family, user_of
from ldft.monitor.samples import DeviceUse, NodeUse, RankUse, RoleUse, RunUse, Sample
from ldft.proc import stat

# Fraction of one core for each kind of expensive reading. Including cheap ones, the total is under 1% at one sample per second.
SHARE = 0.003
# The same during the ranks' initialisation, when nothing is timed and memory grows fast.
SHARE_WHILE_PREPARING = 0.05
# CPU seconds of a reading that may come before its time: DeepSpeed allocates in the first iteration, and a short run would end
# without a reading after it.
_QUICK_S = 0.1
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Pace:
    """Limits how often a reading is made, by its cost."""

    def __init__(self) -> None:
        self._began = -math.inf
        self.cost_s = 0.0
        """CPU seconds of the last reading."""

    def is_due(self, share: float) -> bool:
        """Whether a reading at the cost of the last one would now use at most the fraction `share` of a core."""
        return time.monotonic() >= self._began + self.cost_s / share

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Measures the reading inside the context, which must run in this thread."""
        self._began, before = time.monotonic(), time.thread_time()
        yield
        self.cost_s = time.thread_time() - before


@dataclass(slots=True)
class _Process:
    """State of a rank's process, kept between samples."""

    start: int
    rank: int | None = None
    ticks: int | None = None
    """CPU time at the last sample, taken at `sampled`."""
    sampled: float = 0.0
    memory: tuple[tuple[int, int], ...] | None = None
    read: float = 0.0
    read_in_training: bool = False
    """Whether `memory` is from after its first iteration."""
    forbidden: bool = False
    pcie: tuple[int | None, int | None] = (None, None)
    reported: dict[str, Any] = field(default_factory=dict)
    roles: tuple[RoleUse, ...] = ()
    """Derived from `reported`: one object shared by all samples, so that a long trace takes little memory."""


class Reports:
    """JSON files of attempts, read again only after a change."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], dict[str, Any]]] = {}
        self.forbidden: set[Path] = set()
        """Files that may not be read."""

    def read(self, path: Path) -> dict[str, Any]:
        """The file's content; empty if it does not exist yet or may not be read."""
        try:
            found = path.stat()
            key = (found.st_ino, found.st_mtime_ns, found.st_size)
            known = self._known.get(path)
            if known is None or known[0] != key:
                known = self._known[path] = (key, json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except PermissionError:
            self.forbidden.add(path)
            return {}
        return known[1]

    def forget_others(self, folders: set[Path]) -> None:
        """Keep only the files in these folders."""
        self._known = {path: known for path, known in self._known.items() if path.parent in folders}
        self.forbidden = {path for path in self.forbidden if path.parent in folders}


def nodes(sysfs: Path = SYSFS) -> tuple[NodeUse, ...]:
    """Every NUMA node of the machine that has memory; one node 0 if the kernel has no NUMA support."""
    try:
        online = parse_list((sysfs / "devices/system/node/online").read_text())
    except FileNotFoundError:
        return (_node(0, read_meminfo()),)
    return tuple(node for id in online if (node := _node(id, node_meminfo(id, sysfs))).total)


def _node(id: int, fields: dict[str, int]) -> NodeUse:
    return NodeUse(
        node=id,
        total=fields.get("MemTotal", 0),
        free=fields.get("MemFree", 0),
        # The machine's meminfo uses another name for it.
        page_cache=fields.get("FilePages", fields.get("Cached", 0)),
        huge_total=fields.get("HugePages_Total", 0) * _HUGE,
        huge_free=fields.get("HugePages_Free", 0) * _HUGE,
    )


_HUGE = read_meminfo().get("Hugepagesize", 0)


class Sampler:
    """Samples the same runs repeatedly."""

    def __init__(self, share_while_preparing: float = SHARE) -> None:
        """share_while_preparing: fraction of one core that each kind of expensive reading may use while no rank trains."""
        self._memory_pace, self._pcie_pace = Pace(), Pace()
        self._share_while_preparing = share_while_preparing
        self._processes: dict[int, _Process] = {}
        self._reports = Reports()
        self._gpus = Gpus()

    def sample(self, runs: Sequence[Run]) -> Sample:
        """The current state of the machine and these runs. Runs and ranks that have ended are left out."""
        now = time.time()
        self._follow(runs)
        reports = {run.folder: self._reports_of(run) for run in runs}
        trains = any(report.get("phase") == "train" for by_pid in reports.values() for report in by_pid.values())
        share = SHARE if trains else self._share_while_preparing
        began = [
            self._processes[pid]
            for by_pid in reports.values()
            for pid, report in by_pid.items()
            if report.get("iteration_s")
        ]
        first = self._memory_pace.cost_s < _QUICK_S and not all(process.read_in_training for process in began)
        if first or self._memory_pace.is_due(share):
            with self._memory_pace.reading():
                for pid, process in self._processes.items():
                    _read_memory(pid, process, now)
            for process in began:
                process.read_in_training = True
        if self._pcie_pace.is_due(share):
            with self._pcie_pace.reading():
                for by_pid in reports.values():
                    for pid, report in by_pid.items():
                        if "gpu_uuid" in report:
                            self._processes[pid].pcie = self._gpus.pcie_kb_per_s(report["gpu_uuid"])
        used = (self._run(run, reports[run.folder], now) for run in runs)
        return Sample(time=now, nodes=nodes(), runs=tuple(run for run in used if run is not None))

    def _follow(self, runs: Sequence[Run]) -> None:
        """Add state for new processes, and drop processes that have ended or are no longer requested."""
        before, self._processes = self._processes, {}
        for pid in (pid for run in runs for pid in run.pids):
            known = stat(pid)
            if known is None:
                continue
            process = before.get(pid)
            if process is None or process.start != known.start:
                process = _Process(start=known.start)
            if process.rank is None:
                process.rank = rank_of(pid)
            self._processes[pid] = process
        self._reports.forget_others({run.folder for run in runs})

    def _reports_of(self, run: Run) -> dict[int, dict[str, Any]]:
        """Pid -> report, of the run's live processes."""
        num_ranks = self._reports.read(run.folder / "config.json").get("launch", {}).get("num_ranks", 0)
        reports = [self._reports.read(run.folder / f"rank-{rank}.json") for rank in range(num_ranks)]
        found: dict[int, dict[str, Any]] = {}
        for pid in run.pids:
            if (process := self._processes.get(pid)) is None:
                continue
            if process.rank is None:  # another user's process, but its reports may be readable
                process.rank = next((rank for rank, said in enumerate(reports) if said.get("pid") == pid), None)
            known = process.rank is not None and process.rank < num_ranks
            found[pid] = reports[process.rank] if known and process.rank is not None else {}
        return found

    def _run(self, run: Run, reports: dict[int, dict[str, Any]], now: float) -> RunUse | None:
        ranks = [use for pid in reports if (use := self._rank(pid, reports[pid], now)) is not None]
        user = user_of(ranks[0].pid) if ranks else None
        if user is None:
            return None
        ranks.sort(key=lambda one: (one.rank is None, one.rank, one.pid))
        config = self._reports.read(run.folder / "config.json")
        first = self._reports.read(run.folder / "rank-0.json") if config else {}
        times = first.get("iteration_s", [])
        tokens = _tokens_per_iteration(config) if config else 0
        closed = any(path.parent == run.folder for path in self._reports.forbidden)
        return RunUse(
            folder=str(run.folder),
            user=user,
            title=_title(config) if config else "",
            phase=first.get("phase", "start"),
            phase_text=first.get("phase_text", "" if closed else "starting Python"),
            iteration=len(times),
            iterations=config["train"]["iterations"] if config else None,
            update_s=sum(first["update_s"]) if "update_s" in first else None,
            tokens_per_s=tokens / times[-1] if times else None,
            ranks=tuple(ranks),
            forbidden=closed or any(self._processes[one.pid].forbidden for one in ranks),
        )

    def _rank(self, pid: int, report: dict[str, Any], now: float) -> RankUse | None:
        process = self._processes[pid]
        ticks = ticks_of_family(pid)
        if ticks is None:
            return None
        busy = None
        if process.ticks is not None:
            busy = max(0, ticks - process.ticks) / _TICKS_PER_S / max(now - process.sampled, 1e-3)
        process.ticks, process.sampled = ticks, now
        if process.reported != (memory := report.get("role_memory", {})):
            process.reported, process.roles = memory, _roles(memory)
        return RankUse(
            rank=process.rank,
            pid=pid,
            phase=report.get("phase", "start"),
            cores_busy=busy,
            memory=process.memory,
            memory_age_s=now - process.read if process.memory is not None else 0.0,
            roles=process.roles,
            pinned=report.get("pinned_bytes"),
            device=self._device(report["gpu_uuid"], process) if "gpu_uuid" in report else None,
        )

    def _device(self, uuid: str, process: _Process) -> DeviceUse:
        used, total = self._gpus.memory(uuid)
        received, sent = process.pcie
        return DeviceUse(
            vram_used=used,
            vram_total=total,
            utilisation_percent=self._gpus.utilisation_percent(uuid),
            pcie_rx_kb_per_s=received,
            pcie_tx_kb_per_s=sent,
        )


def _read_memory(pid: int, process: _Process, now: float) -> None:
    if process.forbidden:
        return
    table = process_memory(pid)
    if table.pids:
        process.memory = tuple((id, node.total) for id, node in sorted(table.nodes.items()))
        process.read = now
    else:  # it has ended, or belongs to another user
        process.forbidden = stat(pid) is not None


def _roles(memory: dict[str, Any]) -> tuple[RoleUse, ...]:
    """A rank's tensors by role, from its report."""
    found = []
    for role, said in memory.items():
        by_node = said["nodes"] or {"-1": said["bytes"]}  # -1: pages without memory, e.g. swapped out
        found += [
            RoleUse(role=role, node=int(node) if int(node) >= 0 else None, size=size) for node, size in by_node.items()
        ]
    return tuple(found)


def _tokens_per_iteration(config: dict[str, Any]) -> int:
    train = config["train"]
    sequences = train["micro_batch_size"] * train["gradient_accumulation_steps"] * config["launch"]["num_ranks"]
    return int(sequences * config["seq_len"]["tokens"])


def _title(config: dict[str, Any]) -> str:
    return f"{config['model']['name']}, {config['seq_len']['tokens']} tokens, numa={config['numa']['name']}"
