"""Memory of processes by node, in numastat's categories, read directly from /proc/PID/numa_maps.

    python -m ldft.memory.probe PID...

The kernel walks the page tables to produce numa_maps: about 0.1 us per 4 KiB page (200 GB: 5 s), at most a few milliseconds per GiB
of huge pages. benchmarks/host_memory.py prints this machine's figures. If the kernel has no numa_maps (built without NUMA),
everything in smaps counts as node 0.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ldft.memory.topology import SYSFS, parse_list

PROC = Path("/proc")
CATEGORIES = ("huge", "heap", "stack", "private")
MIB, GIB = 1 << 20, 1 << 30


@dataclass(kw_only=True, slots=True)
class NodeMemory:
    """Bytes that processes have on one node. Pages shared by several processes count in each, as in numastat."""

    huge: int = 0
    """hugetlb pages (not transparent huge pages, which are part of the others)."""
    heap: int = 0
    stack: int = 0
    private: int = 0
    """Everything else, including mapped files."""
    file: int = 0
    """The part of `private` that is file pages: program code and libraries, on the node that first read them."""

    @property
    def total(self) -> int:
        return self.huge + self.heap + self.stack + self.private

    @property
    def anonymous(self) -> int:
        """Bytes that the processes allocated themselves, i.e. those that their policy placed."""
        return self.total - self.file


@dataclass(kw_only=True, slots=True)
class MemoryTable:
    """Memory of a set of processes by node."""

    nodes: dict[int, NodeMemory]
    """Every node of the machine, including nodes that hold nothing."""
    pids: list[int] = field(default_factory=list)
    """Processes that could be read."""
    names: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    """Processes that could not be read: they ended, or belong to another user."""
    source: str = "numa_maps"
    """numa_maps, or smaps where the kernel has no nodes."""

    @property
    def total(self) -> int:
        return sum(node.total for node in self.nodes.values())

    def rows(self) -> list[dict[str, float]]:
        """One dictionary per node, in GiB, as stored in a run's row."""
        return [
            {"node": id, **{f"{name}_gib": getattr(memory, name) / GIB for name in (*CATEGORIES, "total")}}
            for id, memory in sorted(self.nodes.items())
        ]

    def shares_since(self, earlier: "MemoryTable") -> dict[int, float]:
        """Node -> share of the anonymous memory that the processes added since the reading `earlier`.

        A node that lost memory counts as 0. Empty if nothing was added.
        """
        zero = NodeMemory()
        added = {id: max(0, m.anonymous - earlier.nodes.get(id, zero).anonymous) for id, m in self.nodes.items()}
        total = sum(added.values())
        return {id: size / total for id, size in sorted(added.items())} if total else {}

    def render(self, unit: int = MIB) -> str:
        """The table in the format of numastat -p, in MiB ("MBs") or GiB ("GBs")."""
        who = ", ".join(f"{pid} ({name})" for pid, name in zip(self.pids, self.names, strict=True))
        label = {MIB: "MBs", GIB: "GBs"}[unit]
        ids = sorted(self.nodes)
        rows = [[name.capitalize(), *(getattr(self.nodes[id], name) for id in ids)] for name in CATEGORIES]
        rows = [[*row, sum(row[1:])] for row in rows]
        last = ["Total", *(self.nodes[id].total for id in ids), self.total]
        titles = [*(f"Node {id}" for id in ids), "Total"]
        numbers = [[row[0], *(f"{value / unit:.0f}" for value in row[1:])] for row in [*rows, last]]
        widths = [max(6, len(title), *(len(row[i]) for row in numbers)) for i, title in enumerate(titles, 1)]
        lines = [f"Per-node process memory usage (in {label}) for PID {who}"]
        lines.append(" " * 7 + "".join(f" {t:>{w}}" for t, w in zip(titles, widths, strict=True)))
        lines.append(" " * 7 + "".join(" " + "-" * w for w in widths))
        body = [f"{row[0]:<7}" + "".join(f" {v:>{w}}" for v, w in zip(row[1:], widths, strict=True)) for row in numbers]
        lines += [*body[:-1], "-------  " + " ".join("-" * w for w in widths), body[-1]]
        return "\n".join(lines)


def process_memory(pids: int | Iterable[int], proc: Path = PROC, sysfs: Path = SYSFS) -> MemoryTable:
    """Total memory of the processes by node. Processes that end meanwhile or may not be read are listed in `missing`."""
    online = parse_list(_read(sysfs / "devices/system/node/online") or "0")
    table = MemoryTable(nodes={id: NodeMemory() for id in online})
    for pid in [pids] if isinstance(pids, int) else pids:
        folder = proc / str(pid)
        # Read the whole file before counting, so that a process that ends meanwhile counts in full or not at all.
        text = _read(folder / "numa_maps")
        parse = _numa_maps
        if text is None and not (proc / "self/numa_maps").exists():
            text, parse = _read(folder / "smaps"), _smaps
            table.source = "smaps"
        if text is None:
            table.missing.append(pid)
            continue
        for id, category, size, is_file in parse(text):
            memory = table.nodes.setdefault(id, NodeMemory())
            setattr(memory, category, getattr(memory, category) + size)
            memory.file += size if is_file else 0
        table.pids.append(pid)
        table.names.append((_read(folder / "comm") or "?").strip())
    return table


def _numa_maps(text: str) -> Iterator[tuple[int, str, int, bool]]:
    """(node, category, bytes, whether file pages) for each node of each mapping."""
    for line in text.splitlines():
        if " N" not in line:  # no pages: most lines of a process with many libraries
            continue
        words = line.split()
        category, is_file, page = "private", False, 4096
        counts: list[tuple[int, int]] = []
        for word in words[2:]:
            name, _, value = word.partition("=")
            if name[0] == "N" and name[1:].isdigit():
                counts.append((int(name[1:]), int(value)))
            elif name == "kernelpagesize_kB":
                page = int(value) * 1024
            elif name == "file":
                is_file = True
            elif name in ("huge", "heap", "stack"):
                category = name
        # If all pages of a private file mapping were written (a library's data), they are the process's own memory.
        if is_file and category == "private":
            pages = sum(count for _, count in counts)
            own = next((int(w[5:]) for w in words if w.startswith("anon=")), 0)
            is_file = own < pages
        for id, count in counts:
            yield id, category, count * page, is_file and category == "private"


def _smaps(text: str) -> Iterator[tuple[int, str, int, bool]]:
    """The same from smaps, with all of it on node 0."""
    category, is_file = "private", False
    for line in text.splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # address perms offset dev inode [path]
            name = words[5] if len(words) > 5 else ""
            category = {"[heap]": "heap", "[stack]": "stack"}.get(name, "private")
            is_file = name.startswith("/")
        elif words[0] == "Rss:":
            yield 0, category, int(words[1]) * 1024, is_file and category == "private"
        elif words[0] in ("Private_Hugetlb:", "Shared_Hugetlb:"):
            yield 0, "huge", int(words[1]) * 1024, False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def main(arguments: list[str]) -> int:
    """Print the table of the processes named on the command line."""
    if not arguments or not all(word.isdigit() for word in arguments):
        print("usage: python -m ldft.memory.probe PID...", file=sys.stderr)
        return 2
    table = process_memory([int(word) for word in arguments])
    for pid in table.missing:
        print(f"ldft: process {pid} cannot be read: it ended, or belongs to another user", file=sys.stderr)
    if table.pids:
        print(table.render())
    return 1 if table.missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
