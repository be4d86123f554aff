"""How much memory may still be touched: on the machine, on each node, and in this process's cgroups.

A process that touches more is killed without warning. So callers check here first, and again while touching.
"""

from dataclasses import dataclass
from pathlib import Path

from ldft.memory.topology import SYSFS, node_meminfo, read_meminfo

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# Kept free for the rest of the system and for what the estimate of the kernel misses: 1/64 of the machine, at most 1
# GiB.
RESERVE_SHARE, RESERVE_MOST = 64, 1 << 30
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" by a number near 2^63
# By cgroup version. Beyond memory.high a process is not killed, but slowed down so much that its times mean nothing.
_LIMITS = {2: ("memory.max", "memory.high"), 1: ("memory.limit_in_bytes",)}


@dataclass(kw_only=True, slots=True, frozen=True)
class Free:
    """Bytes available now, and the limit that determines them."""

    bytes: int
    limit: str


def free_memory(
    capacity_bytes: int | None = None, proc: Path = PROC, cgroups: Path = CGROUPS, sysfs: Path = SYSFS
) -> Free:
    """Memory that this process can still touch: MemAvailable less a reserve, or what its tightest cgroup leaves.

    capacity_bytes: for virtual machines that report less memory than they can grow to: the machine's actual size, used in place of
    MemTotal. The cgroup's limit applies in either case.
    """
    info = read_meminfo(proc / "meminfo")
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", info.get("MemFree", 0))
    limit = "MemAvailable"
    if capacity_bytes is not None and capacity_bytes > total:
        available += capacity_bytes - total
        total, limit = capacity_bytes, "memory.capacity_gib"
    best = Free(bytes=max(0, available - min(RESERVE_MOST, total // RESERVE_SHARE)), limit=limit)
    tightest = _tightest_cgroup(proc, cgroups)
    return tightest if tightest is not None and tightest.bytes < best.bytes else best


def machine_memory(capacity_bytes: int | None = None, proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Most memory that this process and its like can have together, whatever is in use now: the same for every process of a run.

    The machine's size, or capacity_bytes if that is given (see free_memory), less a reserve; at most the tightest limit of this
    process's cgroups.
    """
    total = capacity_bytes or read_meminfo(proc / "meminfo").get("MemTotal", 0)
    limits = [
        _limit(folder / name)
        for version, folder in cgroup_folders("memory", proc, cgroups)
        for name in _LIMITS[version]
    ]
    return min([total - min(RESERVE_MOST, total // RESERVE_SHARE), *(limit for limit in limits if limit is not None)])


def free_on_node(id: int, sysfs: Path = SYSFS) -> int | None:
    """Bytes available on the node: free pages, and page cache that the kernel drops on demand. None: unknown node."""
    info = node_meminfo(id, sysfs)
    if not info:
        return None
    cache = info.get("Active(file)", 0) + info.get("Inactive(file)", 0) + info.get("SReclaimable", 0)
    return info.get("MemFree", 0) + cache


def cgroup_left(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes until this process's tightest memory cgroup is full (not counting page cache that it can drop); None: no limit."""
    tightest = _tightest_cgroup(proc, cgroups)
    return None if tightest is None else tightest.bytes


def _tightest_cgroup(proc: Path, cgroups: Path) -> Free | None:
    """What the tightest of this process's memory cgroups leaves, and the name of its limit; None: no limit."""
    found = []
    for version, folder in cgroup_folders("memory", proc, cgroups):
        for name in _LIMITS[version]:
            room = _room(folder, name, version)
            if room is not None:
                of = "/" + "/".join(folder.relative_to(cgroups).parts)
                found.append(Free(bytes=max(0, room), limit=f"the cgroup's memory limit ({name} of {of})"))
    return min(found, key=lambda free: free.bytes, default=None)


def cgroup_folders(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> list[tuple[int, Path]]:
    """(cgroup version, folder) of this process's cgroups with a controller and of all their ancestors: each may set a limit.

    In a container, the path may be the host's path, of which only the end is visible here.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, Path]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, root = 2, cgroups if (cgroups / "cgroup.controllers").exists() else cgroups / "unified"
        elif controller in controllers.split(","):
            # Version 1 mounts controllers that go together in one folder, which has both names.
            mounts = [cgroups / name for name in (controllers, controller)]
            version, root = 1, next((mount for mount in mounts if mount.is_dir()), mounts[-1])
        else:
            continue
        folder = root / path.strip("/")
        found += [(version, place) for place in (folder, *folder.parents) if place.is_relative_to(root)]
    return found


def _limit(path: Path) -> int | None:
    """Bytes that one file of a cgroup allows; None: no limit, or no such file."""
    try:
        most = path.read_text().strip()
        return None if most == "max" or int(most) >= _UNLIMITED else int(most)
    except (OSError, ValueError):
        return None


def _room(folder: Path, limit: str, version: int) -> int | None:
    used, prefix = ("memory.current", "") if version == 2 else ("memory.usage_in_bytes", "total_")
    # Count both LRU lists, as for a node: files mapped by several runs (weights) move to the active list but are still reclaimable.
    cache = {f"{prefix}active_file", f"{prefix}inactive_file"}
    most = _limit(folder / limit)
    if most is None:
        return None
    try:
        droppable = 0
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in cache:
                droppable += int(value)
        return most - int((folder / used).read_text()) + droppable
    except (OSError, ValueError):
        return None
