"""What the kernel does against a placement without telling anyone, from its counters: so that shares that are off have a cause.

Two things take pages elsewhere than a policy wants (docs/numa.md, "When shares are off"). Both are counted for the machine as a
whole; what they did to one process nobody counts.

- A node without free memory is passed over by preferred placement and interleaving, and file cache is not free memory
  (numa_foreign in /sys/devices/system/node/node*/numastat; Documentation/admin-guide/numastat.rst).
- khugepaged merges base pages into huge pages, each on the node that had most of its pages
  (thp_collapse_alloc in /proc/vmstat; mm/khugepaged.c, hpage_collapse_find_target_node).
"""

from dataclasses import dataclass
from pathlib import Path

from ldft.memory.topology import SYSFS, parse_list

PROC = Path("/proc")


@dataclass(kw_only=True, slots=True, frozen=True)
class Counters:
    """Since boot, or between two readings."""

    passed_over: dict[int, int]
    """Node -> allocations that were meant for it and went to another node. A huge page counts as one."""
    merged_bytes: int
    """What khugepaged has put into huge pages."""

    def since(self, earlier: "Counters") -> "Counters":
        passed = {node: count - earlier.passed_over.get(node, 0) for node, count in self.passed_over.items()}
        return Counters(passed_over=passed, merged_bytes=self.merged_bytes - earlier.merged_bytes)

    def explain(self, nodes: set[int]) -> list[str]:
        """What may have taken memory away from `nodes`, with the remedy; a clause each."""
        full = {node: count for node, count in self.passed_over.items() if count > 0 and node in nodes}
        said = []
        if full:
            who = ", ".join(f"node {node} {count} times" for node, count in sorted(full.items()))
            said.append(
                f"the kernel passed over {who} for want of free memory, and file cache is not free: "
                "echo 1 > /proc/sys/vm/drop_caches, as root, frees it"
            )
        if self.merged_bytes > 0:
            said.append(
                f"khugepaged merged {self.merged_bytes / 2**30:.2f} GiB of this machine's memory into huge pages, each on the node "
                "that had most of it: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root, stops that"
            )
        return said


def read_counters(sysfs: Path = SYSFS, proc: Path = PROC) -> Counters:
    """The counters now; zeros for those that this kernel does not keep."""
    nodes = sysfs / "devices/system/node"
    huge = _first(sysfs / "kernel/mm/transparent_hugepage/hpage_pmd_size")
    return Counters(
        passed_over={node: _value(nodes / f"node{node}/numastat", "numa_foreign") for node in _online(nodes)},
        merged_bytes=_value(proc / "vmstat", "thp_collapse_alloc") * huge,
    )


def _online(nodes: Path) -> tuple[int, ...]:
    try:
        return parse_list((nodes / "online").read_text())
    except OSError:
        return (0,)


def _value(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _first(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError:
        return 0
