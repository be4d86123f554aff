"""A machine's profile: bandwidths by node, computed from measured rows and read by numa=optimal and the cost model."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldft import files
from ldft.bench.nodes import COPIES, NodeSet
from ldft.memory.limits import free_memory, free_on_node
from ldft.memory.topology import Topology

# An array of this size exceeds the caches of most machines, and Adam uses four.
_LEAST, _MOST = 64 << 20, 1 << 30


def save(profile: Mapping[str, Any], path: Path) -> None:
    """Write a profile atomically; devices that were measured before, in other precisions, stay. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    devices = _devices(path) | profile.get("devices", {})
    with files.replacing(path) as file:
        file.write(json.dumps({**profile, **({"devices": devices} if devices else {})}, indent=2).encode() + b"\n")


def _devices(path: Path) -> dict[str, Any]:
    """Measured devices of a profile; empty if there is none, or if it is damaged, since it is replaced."""
    try:
        found: dict[str, Any] = json.loads(path.read_text()).get("devices", {})
        return found
    except (OSError, ValueError, AttributeError):
        return {}


def make(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The profile: by node, the rates of Adam and of copies, summed over processes; as link, the best copy rates of one process."""
    by_node: dict[str, dict[str, float]] = {}
    link: dict[str, float] = {}
    largest = max((row["array_bytes"] for row in rows), default=0)
    for row in rows:
        name = {"adam": "cpu"}.get(row["kernel"], row["kernel"])
        if row["array_bytes"] != largest or "," in row["nodes"] or name not in ("cpu", *COPIES):
            continue
        together = [
            other["gb_per_s"]
            for other in rows
            if all(other[key] == row[key] for key in ("kernel", "nodes", "weights", "processes", "array_bytes"))
        ]
        entry = by_node.setdefault(f"node{row['nodes']}", {})
        entry[name] = round(max(entry.get(name, 0.0), sum(together)), 3)
        if name in COPIES:
            link[name] = round(max(link.get(name, 0.0), row["gb_per_s"]), 3)
    bandwidth: dict[str, Any] = dict(by_node)
    if link:
        bandwidth["link"] = link
    return {
        "host": socket.gethostname(),
        "measured_at": rows[0]["measured_at"] if rows else None,
        "bandwidth": bandwidth,
    }


def default_size(topology: Topology) -> int:
    """Bytes per array: well above the caches, with four arrays taking a sixteenth of the smallest node's free memory."""
    free = min([free_on_node(node) or free_memory().bytes for node in topology.memory_nodes] + [free_memory().bytes])
    wanted = min(_MOST, max(4 * _LEAST, 16 * len(os.sched_getaffinity(0)) << 20))
    return max(1 << 20, min(wanted, free // 64) >> 20 << 20)


def least_size(default: int) -> int:
    """Smallest array, in bytes, whose rates are those of memory and not of caches; the default if memory is too small for that."""
    return min(default, max(_LEAST, 2 * len(os.sched_getaffinity(0)) << 20))


def lacks(kernels: list[str], sets: list[NodeSet], topology: Topology, size: int, least: int) -> str:
    """What these measurements lack for a profile, and how to measure it; empty if nothing. A profile replaces the previous one, so
    it needs Adam on every node."""
    if "adam" not in kernels:
        return "a profile needs the kernel adam"
    if missing := set(topology.memory_nodes) - {node_set.nodes[0] for node_set in sets if len(node_set.nodes) == 1}:
        return f"a profile needs each node measured alone; leave out --nodes, or add {min(missing)}"
    if size < least:
        return f"arrays of {size / 2**20:.2f} MiB may fit in caches; for a profile, measure with --sizes {-(-least >> 20)}M or more"
    return ""
