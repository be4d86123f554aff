"""The independent witness: a process of its own that reads where another process's pages are, and shares no code with ldft.

It answers one JSON line for each line it gets, {"pid", "ranges", "weights"}, from three files and calls of the kernel:
numa_maps (pages by node of each mapping, and its policy), maps and smaps (where a mapping ends, and how much of it is in huge
pages), and move_pages for the pages of the range alone, since a mapping may be larger than one tensor.
Standard library only: it starts in two seconds in the emulated machine, before torch is there.
"""

import array
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = 4096
ABSENT = 255
MOVE_PAGES = 279  # the number of the system call on x86-64
libc = ctypes.CDLL(None, use_errno=True)


def mappings(pid: int) -> list[dict]:
    """Every mapping of a process: start, end, policy, pages by node, KiB in huge pages."""
    ends, huge = {}, {}
    start = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if not line[0].isupper():  # a mapping's first line; those of its fields begin with a capital
            first, _, last = line.split(" ", 1)[0].partition("-")
            start = int(first, 16)
            ends[start] = int(last, 16)
        elif line.startswith("AnonHugePages:"):
            huge[start] = int(line.split()[1])
    rows = []
    for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines():
        address, policy, *fields = line.split()
        start = int(address, 16)
        if policy == "weighted" or (fields[:1] and fields[0].startswith("(")):
            # "weighted interleave:0,3" and "prefer (many):0-1" are one policy in two words
            policy, fields = f"{policy} {fields[0]}", fields[1:]
        named = dict(field.split("=", 1) for field in fields if "=" in field)
        if start in ends:
            unit = int(named.get("kernelpagesize_kB", 4)) * 1024 // PAGE
            nodes = {name[1:]: int(count) * unit for name, count in named.items() if re.fullmatch(r"N\d+", name)}
            anonymous = int(named.get("anon", 0)) * unit
            row = {"start": start, "end": ends[start], "policy": policy, "nodes": nodes}
            rows.append({**row, "anonymous": anonymous, "file": named.get("file"), "huge_kib": huge.get(start, 0)})
    return rows


def moved(pid: int, first: int, length: int) -> bytes:
    """Node of each of `length` pages from `first`, one byte each; ABSENT where a page has no memory of its own."""
    pages = array.array("Q", range(first, first + length * PAGE, PAGE))
    nodes = array.array("i", bytes(4 * length))
    addresses = [ctypes.c_void_p(numbers.buffer_info()[0]) for numbers in (pages, nodes)]
    if libc.syscall(MOVE_PAGES, pid, ctypes.c_ulong(length), addresses[0], None, addresses[1], 0):
        raise OSError(ctypes.get_errno(), "move_pages")
    return bytes(node if node >= 0 else ABSENT for node in nodes)


def count(nodes: bytes) -> dict[str, int]:
    return {str(-1 if node == ABSENT else node): nodes.count(node) for node in set(nodes)}


def add(rows: list[dict]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for row in rows:
        for node, count in row["nodes"].items():
            totals[node] = totals.get(node, 0) + count
    return totals


def worst_prefix(nodes: bytes, weights: dict[str, int]) -> float:
    """Of all beginnings of the range: by how many pages a node is at most off its share of that beginning."""
    total, step = sum(weights.values()), 64
    worst = 0.0
    for node, weight in weights.items():
        number = 0
        for start in range(0, len(nodes), step):
            number += nodes.count(int(node), start, start + step)
            worst = max(worst, abs(number - min(start + step, len(nodes)) * weight / total))
    return worst


def answer(request: dict) -> dict:
    """Of ranges [[address, bytes], ...]: pages by numa_maps over their mappings together, and by move_pages over each range."""
    rows = mappings(request["pid"])
    if not request["ranges"]:
        anonymous = [row for row in rows if row["anonymous"] and not row["file"]]
        policies = sorted({row["policy"] for row in anonymous})
        return {
            "nodes": add(rows),
            "anonymous_nodes": add(anonymous),
            "anonymous_policies": {name: add([row for row in anonymous if row["policy"] == name]) for name in policies},
        }
    spans = [(a // PAGE * PAGE, -(-(a + size) // PAGE) * PAGE) for a, size in request["ranges"]]
    rows = [row for row in rows if any(row["start"] < last and row["end"] > first for first, last in spans)]
    found = [moved(request["pid"], first, (last - first) // PAGE) for first, last in spans]
    reply = {
        "nodes": add(rows),
        "exact_nodes": [count(nodes) for nodes in found],
        # Neighbours with the same policy are one mapping for the kernel: then numa_maps counts more than was asked about.
        "outside_bytes": sum(r["end"] - r["start"] for r in rows) - sum(last - first for first, last in spans),
        "mappings": len(rows),
        "policies": sorted({row["policy"] for row in rows}),
        "huge_kib": sum(row["huge_kib"] for row in rows),
    }
    if "weights" in request:
        reply["worst_prefix"] = max(worst_prefix(nodes, request["weights"]) for nodes in found)
    return reply


class Reader:
    """Starts the process above and asks it."""

    def __init__(self) -> None:
        words = [sys.executable, "-I", "-S", __file__]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, pid: int, ranges: list[tuple[int, int]], weights: dict[int, int] | None = None) -> dict:
        """Pages by node of the ranges (address, bytes) of a process; of all it has mapped when there are none."""
        assert self.process.stdin and self.process.stdout
        request = {"pid": pid, "ranges": ranges} | ({"weights": weights} if weights else {})
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline() or '{"error": "it died"}')
        if "error" in reply:
            raise RuntimeError(f"reader: {reply['error']}")
        for name in ("nodes", "anonymous_nodes"):
            if name in reply:
                reply[name] = integers(reply[name])
        if "exact_nodes" in reply:
            reply["exact_nodes"] = [integers(counts) for counts in reply["exact_nodes"]]
        return reply


def integers(counts: dict[str, int]) -> dict[int, int]:
    """JSON has no integer keys."""
    return {int(node): count for node, count in sorted(counts.items())}


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
