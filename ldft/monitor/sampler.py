"""Samples active runs from outside their processes, for the live monitor and for a run's trace.

Cheap readings (the ranks' reports, CPU time, memory of the nodes) are made for every sample. Expensive ones (a process's numa_maps,
for which the kernel walks its page tables; NVML's PCIe counters) are made as often as a small fraction of one core allows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldft.memory.probe import process_memory
from ldft.memory.topology import SYSFS, node_meminfo, parse_list, read_meminfo
from ldft.monitor.gpu_use import Gpus
from ldft.monitor.processes import Run, rank_of, ticks_of_family, user_of
from ldft.monitor.reports import Report, Reports
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
    roles: tuple[RoleUse, ...] = ()
    """As reported: one object shared by all samples, so that a long trace takes little memory."""


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
        trains = any(report.phase == "train" for by_pid in reports.values() for report in by_pid.values())
        share = SHARE if trains else self._share_while_preparing
        began = [self._processes[pid] for by_pid in reports.values() for pid, report in by_pid.items() if report.times]
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
                        if report.gpu_uuid:
                            self._processes[pid].pcie = self._gpus.pcie_kb_per_s(report.gpu_uuid)
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

    def _reports_of(self, run: Run) -> dict[int, Report]:
        """Pid -> report, of the run's live processes."""
        num_ranks = self._reports.about(run.folder).num_ranks
        reports = [self._reports.rank(run.folder, rank) for rank in range(num_ranks)]
        found: dict[int, Report] = {}
        for pid in run.pids:
            if (process := self._processes.get(pid)) is None:
                continue
            if process.rank is None:  # another user's process, but its reports may be readable
                process.rank = next((rank for rank, said in enumerate(reports) if said.pid == pid), None)
            known = process.rank is not None and process.rank < num_ranks
            found[pid] = reports[process.rank] if known and process.rank is not None else Report()
        return found

    def _run(self, run: Run, reports: dict[int, Report], now: float) -> RunUse | None:
        ranks = [use for pid in reports if (use := self._rank(pid, reports[pid], now)) is not None]
        user = user_of(ranks[0].pid) if ranks else None
        if user is None:
            return None
        ranks.sort(key=lambda one: (one.rank is None, one.rank, one.pid))
        about = self._reports.about(run.folder)
        first = self._reports.rank(run.folder, 0) if about.title else Report()
        closed = any(path.parent == run.folder for path in self._reports.forbidden)
        damaged = any(path.parent == run.folder for path in self._reports.unreadable)
        said = first.phase != "start" or not (closed or damaged)
        return RunUse(
            folder=str(run.folder),
            user=user,
            title=about.title,
            phase=first.phase,
            phase_text=first.phase_text if said else "",
            iteration=len(first.times),
            iterations=about.iterations,
            update_s=first.update_s,
            tokens_per_s=about.tokens / first.times[-1] if first.times else None,
            ranks=tuple(ranks),
            forbidden=closed or any(self._processes[one.pid].forbidden for one in ranks),
        )

    def _rank(self, pid: int, report: Report, now: float) -> RankUse | None:
        process = self._processes[pid]
        ticks = ticks_of_family(pid)
        if ticks is None:
            return None
        busy = None
        if process.ticks is not None:
            busy = max(0, ticks - process.ticks) / _TICKS_PER_S / max(now - process.sampled, 1e-3)
        process.ticks, process.sampled = ticks, now
        if process.roles != report.roles:
            process.roles = report.roles
        return RankUse(
            rank=process.rank,
            pid=pid,
            phase=report.phase,
            cores_busy=busy,
            memory=process.memory,
            memory_age_s=now - process.read if process.memory is not None else 0.0,
            roles=process.roles,
            pinned=report.pinned,
            device=self._device(report.gpu_uuid, process) if report.gpu_uuid else None,
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
