"""How much of the machine's CPUs this process may use, and what too few cores cost. Imports no torch.

Schedulers and containers often allow only one or two cores by default: SLURM through the CPU affinity, containers through a CPU
quota, which the affinity does not show. The CPU update then takes minutes instead of seconds, without any other sign of the cause.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ldft import _native
from ldft.memory import cost_model
from ldft.memory.limits import CGROUPS, PROC, cgroup_folders
from ldft.memory.topology import SYSFS, parse_list
from ldft.preflight import strategies
from ldft.preflight.resolved import Resolved
from ldft.runner import core_binding
from ldft.terminal import plural

# With few cores, do not warn if the update takes less than this.
_WORTH_A_WARNING_S = 1.0


@dataclass(frozen=True, slots=True)
class Cpus:
    """The CPUs that this process may use."""

    cores: int
    """Physical cores in its affinity."""
    quota: float | None
    """CPU seconds per second that its tightest cgroup allows; None: no limit."""
    machine: int
    """Online physical cores of the machine."""

    @property
    def usable(self) -> float:
        """Usable CPU time, in cores."""
        return self.cores if self.quota is None else min(float(self.cores), self.quota)


def cpus(proc: Path = PROC, cgroups: Path = CGROUPS, sysfs: Path = SYSFS) -> Cpus:
    """This process's share of the machine's CPUs."""
    online = sysfs / "devices/system/cpu/online"
    every = frozenset(parse_list(online.read_text()) if online.is_file() else range(os.cpu_count() or 1))
    return Cpus(
        cores=len(core_binding.physical_cores(frozenset(os.sched_getaffinity(0)), sysfs)),
        quota=quota(proc, cgroups),
        machine=len(core_binding.physical_cores(every, sysfs)),
    )


def quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """CPUs that this process's tightest cgroup (version 1 or 2) allows; None: no limit."""
    limits = (_limit(folder) for _, folder in cgroup_folders("cpu", proc, cgroups))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if most in ("max", "-1") else int(most) / int(period)
    except (OSError, ValueError):  # no such controller here
        return None


def threads(cores: list[int], num_ranks: int, quota: float | None) -> int:
    """Number of threads for a rank bound to these CPUs: with more than the quota allows, they would only wait for one another."""
    return len(cores) if quota is None else max(1, min(len(cores), math.floor(quota / num_ranks)))


def warnings(run: Resolved, have: Cpus | None = None) -> list[str]:
    """A warning with the expected update time if ranks share cores or may use less than half of the machine's cores."""
    config, have = run.config, have or cpus()
    bytes_ = _update_bytes(run)
    short = have.usable < max(config.launch.ranks_per_host, have.cores)
    few = 2 * have.usable <= have.machine
    if not bytes_ or not (short or few):
        return []
    seconds = bytes_ / (have.usable * _core_bytes_per_s())
    if seconds < _WORTH_A_WARNING_S and not short:
        return []
    ranks = config.launch.ranks_per_host
    who = "1 rank has" if ranks == 1 else f"{ranks} ranks share"
    if have.quota is not None and have.quota < have.cores:
        limit = f" of this machine's {have.machine} (the CPU quota of its container or cgroup)"
    elif have.cores < have.machine:
        limit = f" of this machine's {have.machine} (its CPU affinity, as SLURM's --cpus-per-task or taskset sets it)"
    else:
        limit = ""
    return [
        f"{who} {plural(have.usable, 'CPU core')}{limit}; the update is expected to take {seconds:.2g} s an iteration, by the "
        "speed of one core, measured just now; allow more cores, or use fewer ranks"
    ]


def _update_bytes(run: Resolved) -> float:
    """Bytes that the CPU update moves, over all ranks; 0 if the device updates."""
    accesses = cost_model.update_of(strategies.streams(run))
    sizes = run.estimate.roles
    if "momentum" not in sizes:
        return 0.0
    return float(run.config.launch.ranks_per_host * sum(size * accesses.get(role, 0) for role, size in sizes.items()))


@cache
def _core_bytes_per_s(count: int = 1 << 22) -> float:
    """Bytes per second that the native AdamW moves on one core from memory: 28 bytes per parameter, over `count` parameters."""
    arrays = [mmap.mmap(-1, 4 * count) for _ in range(4)]
    weights, gradients, momentum, variance = (addressof(c_char.from_buffer(array)) for array in arrays)
    rule = _native.AdamW(1.0, 0.9, 0.95, 1e-8, 1.0, -1e-4, 0.0)
    best = math.inf
    for _ in range(3):  # the first touches the memory
        started = time.perf_counter()
        update = _native.Update(arrays)
        update.add(rule, weights, gradients, _native.Type.fp32, momentum, variance, 0, _native.Type.fp32, count)
        update.start(0, 0)
        update.finish()
        best = min(best, time.perf_counter() - started)
    return 28 * count / best
