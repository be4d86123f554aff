"""Why shares differ from the requested placement: what the kernel silently did to it, from the kernel's counters.

Two mechanisms misplace pages (docs/numa.md, "When shares are off"). The kernel counts both for the whole machine only, not per
process.

- Preferred placement and interleaving pass over a node without free memory, and file cache does not count as free memory
  (numa_foreign in /sys/devices/system/node/node*/numastat; Documentation/admin-guide/numastat.rst).
- khugepaged merges base pages into huge pages, each on the node that held most of its pages
  (thp_collapse_alloc in /proc/vmstat; mm/khugepaged.c, hpage_collapse_find_target_node).
"""

from dataclasses import dataclass
from pathlib import Path

from ldft.memory.topology import SYSFS, parse_list

PROC = Path("/proc")


@dataclass(kw_only=True, slots=True, frozen=True)
class Counters:
    """Counter values since boot, or between two readings."""

    passed_over: dict[int, int]
    """Node -> allocations intended for it that went to another node. A huge page counts as one."""
    merged_bytes: int
    """Bytes that khugepaged merged into huge pages."""

    def since(self, earlier: "Counters") -> "Counters":
        passed = {node: count - earlier.passed_over.get(node, 0) for node, count in self.passed_over.items()}
        return Counters(passed_over=passed, merged_bytes=self.merged_bytes - earlier.merged_bytes)

    def explain(self, nodes: set[int]) -> list[str]:
        """Possible causes of memory missing from `nodes`, each with its remedy; one clause per cause."""
        full = {node: count for node, count in self.passed_over.items() if count > 0 and node in nodes}
        said = []
        if full:
            who = ", ".join(f"node {node} {count} times" for node, count in sorted(full.items()))
            said.append(
                f"the kernel passed over {who} for lack of free memory, and file cache does not count as free: "
                "to free it, run as root: echo 1 > /proc/sys/vm/drop_caches"
            )
        if self.merged_bytes > 0:
            said.append(
                f"khugepaged merged {self.merged_bytes / 2**30:.2f} GiB of this machine's memory into huge pages, each on the node "
                "that had most of it: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root, stops that"
            )
        return said


def read_counters(sysfs: Path = SYSFS, proc: Path = PROC) -> Counters:
    """The current counters; 0 for those that this kernel does not keep."""
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
