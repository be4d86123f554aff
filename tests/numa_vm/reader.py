"""The independent witness: a process of its own that reads where another process's pages are, and shares no code with ldft.

It answers one JSON line for each line it gets, {"pid", "address", "bytes"}, from three files and calls of the kernel:
numa_maps (pages by node of each mapping, and its policy), maps and smaps (where a mapping ends, and how much of it is in huge
pages), and move_pages for the pages of the range alone, since a mapping may be larger than one tensor.
Standard library only: it starts in two seconds in the emulated machine, before torch is there.
"""

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = 4096
MOVE_PAGES = 279  # the number of the system call on x86-64
libc = ctypes.CDLL(None, use_errno=True)


def mappings(pid: int) -> list[dict]:
    """Every mapping of a process: start, end, policy, pages by node, KiB in huge pages."""
    ends, huge = {}, {}
    start = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start = int(found[1], 16)
            ends[start] = int(found[2], 16)
        elif line.startswith("AnonHugePages:"):
            huge[start] = int(line.split()[1])
    rows = []
    for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines():
        address, policy, *fields = line.split()
        start = int(address, 16)
        if policy == "weighted":  # "weighted interleave:0,3" is one policy in two words
            policy, fields = f"{policy} {fields[0]}", fields[1:]
        named = dict(field.split("=", 1) for field in fields if "=" in field)
        if start in ends:
            unit = int(named.get("kernelpagesize_kB", 4)) * 1024 // PAGE
            nodes = {name[1:]: int(count) * unit for name, count in named.items() if re.fullmatch(r"N\d+", name)}
            anonymous = int(named.get("anon", 0)) * unit
            row = {"start": start, "end": ends[start], "policy": policy, "nodes": nodes}
            rows.append({**row, "anonymous": anonymous, "file": named.get("file"), "huge_kib": huge.get(start, 0)})
    return rows


def moved(pid: int, first: int, count: int) -> dict[str, int]:
    """Pages by node of `count` pages from `first`; "-1" where a page was not touched."""
    pages = (ctypes.c_void_p * count)(*range(first, first + count * PAGE, PAGE))
    nodes = (ctypes.c_int * count)()
    if libc.syscall(MOVE_PAGES, pid, ctypes.c_ulong(count), pages, None, nodes, 0):
        raise OSError(ctypes.get_errno(), "move_pages")
    totals: dict[str, int] = {}
    for node in nodes:
        key = str(max(node, -1))
        totals[key] = totals.get(key, 0) + 1
    return totals


def add(rows: list[dict]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for row in rows:
        for node, count in row["nodes"].items():
            totals[node] = totals.get(node, 0) + count
    return totals


def answer(request: dict) -> dict:
    """Of one range: pages by numa_maps over its mappings, by move_pages over exactly the range, and what the mappings say."""
    rows = mappings(request["pid"])
    if "address" not in request:
        return {
            "nodes": add(rows),
            "anonymous_nodes": add([row for row in rows if row["anonymous"] and not row["file"]]),
        }
    first = request["address"] // PAGE * PAGE
    last = -(-(request["address"] + request["bytes"]) // PAGE) * PAGE
    rows = [row for row in rows if row["start"] < last and row["end"] > first]
    return {
        "nodes": add(rows),
        "exact_nodes": moved(request["pid"], first, (last - first) // PAGE),
        "outside_bytes": sum(max(first - r["start"], 0) + max(r["end"] - last, 0) for r in rows),
        "mappings": len(rows),
        "policies": sorted({row["policy"] for row in rows}),
        "huge_kib": sum(row["huge_kib"] for row in rows),
    }


class Reader:
    """Starts the process above and asks it."""

    def __init__(self) -> None:
        words = [sys.executable, "-I", "-S", __file__]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, pid: int, address: int | None = None, size: int = 0) -> dict:
        assert self.process.stdin and self.process.stdout
        request = {"pid": pid} if address is None else {"pid": pid, "address": address, "bytes": size}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline() or '{"error": "the reader died"}')
        if "error" in reply:
            raise RuntimeError(f"reader: {reply['error']}")
        for name in ("nodes", "exact_nodes", "anonymous_nodes"):
            if name in reply:
                reply[name] = {int(node): count for node, count in reply[name].items()}
        return reply


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
