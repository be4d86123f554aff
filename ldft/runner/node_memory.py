"""Requested and actual placement of a run's memory: read in each rank, summed over the ranks by the parent.

The memory that a rank has before its policy is set (the interpreter) was placed by the process that started it. So each rank reads
its numa_maps twice, right after setting the policy and after the last iteration; the policy decided about the memory added in
between. File pages are left out: they are on the node that first read them. The machine's counters of misplaced pages (drift.py)
are read at the same two moments.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from ldft.config import Config
from ldft.memory import placing
from ldft.memory.drift import Counters, read_counters
from ldft.memory.policy import Placement, process_policy, set_process_policy
from ldft.memory.probe import GIB, MIB, MemoryTable, NodeMemory, process_memory
from ldft.preflight import role_placement
from ldft.preflight.selection import Selection

# Warn if a share is further off than this. Small processes are off by the interpreter's own allocations.
_TOLERANCE, _WORTH_A_WARNING = 0.05, 64 * MIB


def settle(config: Config) -> None:
    """Apply the config's settings for all allocations of this process."""
    placing.settings.huge_pages = config.memory.huge_pages
    placing.settings.capacity_gib = config.memory.capacity_gib or None


def begin(run: Selection) -> tuple[MemoryTable, dict[str, Any]]:
    """Set the process policy, in a rank that has touched little memory yet. Returns the first reading and values for the report."""
    config, topology = run.config, run.topology
    settle(config)
    placement, mechanism = config.numa.placement, None
    striped = role_placement.stripes_of_process(run)
    if striped is not None:
        # Memory outside arenas is spread over the same nodes as closely as the kernel can.
        set_process_policy(Placement(kind="interleave", nodes=striped.nodes), topology)
        placement, mechanism = striped, "stripes"
    elif placement.kind != "default":
        placement, mechanism = set_process_policy(placement, topology), "kernel"
    inherited = process_policy(topology)  # as the kernel reports it, whoever set it
    asked = inherited if placement.kind == "default" else placement
    shares = asked.shares()
    said = {
        "numa_policy": asked.describe(),
        "numa_requested": None if shares is None else {str(node): share for node, share in shares.items()},
        "numa_kernel_weights_json": json.dumps(topology.weights) if topology.weights else None,
        "numa_counters": _plain(read_counters()),
        "numa_mechanism": mechanism,
    }
    return process_memory(os.getpid()), said


def end(first: MemoryTable) -> dict[str, Any]:
    """The second reading: this rank's memory by node, and the memory added since the first reading."""
    table = process_memory(os.getpid())
    zero = NodeMemory()
    added = {str(n): max(0, m.anonymous - first.nodes.get(n, zero).anonymous) for n, m in table.nodes.items()}
    parts = {str(n): [m.huge, m.heap, m.stack, m.private, m.file] for n, m in table.nodes.items()}
    process = [table.pids, table.names]
    return {
        "numa_added": added,
        "numa_memory": parts,
        "numa_process": process,
        "numa_counters_end": _plain(read_counters()),
    }


def _plain(counters: Counters) -> dict[str, Any]:
    return dataclasses.asdict(counters) | {"passed_over": {str(n): count for n, count in counters.passed_over.items()}}


def _drift(report: dict[str, Any]) -> Counters:
    """The counters of misplaced pages between this rank's two readings."""

    def counters(name: str) -> Counters:
        values = report[name]
        passed = {int(node): count for node, count in values["passed_over"].items()}
        return Counters(passed_over=passed, merged_bytes=values["merged_bytes"])

    return counters("numa_counters_end").since(counters("numa_counters"))


def _asked(report: dict[str, Any]) -> set[int]:
    """Nodes that the policy names; all nodes if it names none."""
    requested = report["numa_requested"]
    return {int(node) for node, share in requested.items() if share} if requested else set(_drift(report).passed_over)


def table_of(reports: list[dict[str, Any]]) -> MemoryTable | None:
    """The ranks' memory by node, summed; None if a rank has not reported it."""
    if not all("numa_memory" in report for report in reports):
        return None
    table = MemoryTable(nodes={})
    for report in reports:
        pids, names = report["numa_process"]
        table.pids += pids
        table.names += names
        for node, parts in report["numa_memory"].items():
            memory = table.nodes.setdefault(int(node), NodeMemory())
            for name, size in zip(("huge", "heap", "stack", "private", "file"), parts, strict=True):
                setattr(memory, name, getattr(memory, name) + size)
    return table


def columns(reports: list[dict[str, Any]], host: str) -> dict[str, Any]:
    """The row's columns about nodes, from the ranks' reports; unknown ones are left out. host: of ranks that do not say it."""
    first = reports[0]
    row: dict[str, Any] = {name: first[name] for name in ("numa_policy", "numa_kernel_weights_json") if name in first}
    used = {report.get("numa_mechanism") for report in reports}.union(
        *(report.get("role_methods", ()) for report in reports)
    )
    row["numa_mechanism"] = next((method for method in ("stripes", "kernel") if method in used), None)
    if all("roles" in report for report in reports):
        row["roles"] = [
            entry
            for rank, report in enumerate(reports)
            for role in report["roles"]
            for entry in _role(report.get("host", host), rank, role)
        ]
    if table_of(reports) is None:
        return row
    by_host: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        by_host.setdefault(report.get("host", host), []).append(report)
    row |= {"nodes": [], "numa_shares": [], "numa_passed_over": 0, "khugepaged_gib": 0.0}
    for name, mine in by_host.items():
        table, drift = table_of(mine), _drift(mine[0])
        assert table
        row["nodes"] += [{"host": name, **node} for node in table.rows()]
        row["numa_shares"] += _shares(mine, name)
        row["numa_passed_over"] += sum(count for node, count in drift.passed_over.items() if node in _asked(mine[0]))
        row["khugepaged_gib"] += drift.merged_bytes / GIB
    return row


def _shares(reports: list[dict[str, Any]], host: str) -> list[dict[str, Any]]:
    """Of one host's ranks: what they added to each node."""
    added: dict[int, int] = {}
    for report in reports:
        for node, size in report["numa_added"].items():
            added[int(node)] = added.get(int(node), 0) + size
    total = sum(added.values())
    asked = reports[0]["numa_requested"]
    return [
        {
            "host": host,
            "node": node,
            "added_gib": added.get(node, 0) / GIB,
            "share": added.get(node, 0) / total if total else None,
            "requested_share": None if asked is None else asked.get(str(node), 0.0),
        }
        for node in sorted(added)
    ]


def _role(host: str, rank: int, role: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of one role of a rank: one per node that has, or should have, some of it.

    Without page counts its placement is unknown: the shares are null, and so is the node if none was requested.
    """
    pages, asked = role["pages"], role["requested"]
    total = sum(pages.values())
    return [
        {
            "host": host,
            "rank": rank,
            "role": role["role"],
            "bytes": role["bytes"],
            "node": None if node is None else int(node),
            "share": pages.get(node, 0) / total if total else None,
            "requested_share": None if asked is None else asked.get(node, 0.0),
        }
        for node in sorted({*pages, *(asked or {})}, key=int) or [None]
    ]


def notes(row: dict[str, Any]) -> list[str]:
    """Notes for a row whose roles have no shares."""
    if all(entry["share"] is not None for entry in row.get("roles") or ()):
        return []
    return [
        "the nodes of offloaded tensors were not verified: move_pages is forbidden here, as by Docker's default profile (use "
        "--security-opt seccomp=unconfined); numa_shares has the placement of the ranks' whole memory"
    ]


def _role_lines(roles: list[dict[str, Any]]) -> list[str]:
    """One line per role, summed over ranks: its size, and requested and actual shares by node."""
    said = [f"ldft: {'role':<18}{'GiB':>9}  asked -> got by node"]
    for role in dict.fromkeys(entry["role"] for entry in roles):
        mine = [entry for entry in roles if entry["role"] == role]
        sizes = {entry["rank"]: entry["bytes"] for entry in mine}
        total = sum(sizes.values())
        nodes = []
        for node in sorted({entry["node"] for entry in mine}):
            there = [entry for entry in mine if entry["node"] == node]
            known = all(entry["share"] is not None for entry in there)
            got = f"{sum(e['share'] * e['bytes'] for e in there) / total:.1%}" if known else "not verified"
            open_ = any(entry["requested_share"] is None for entry in there)
            asked = "-" if open_ else f"{sum(e['requested_share'] * e['bytes'] for e in there) / total:.1%}"
            nodes.append(f"{node}: {asked} -> {got}")
        said.append(f"ldft: {role:<18}{total / GIB:>9.3f}  {', '.join(nodes)}")
    return said


def lines(row: dict[str, Any], reports: list[dict[str, Any]]) -> list[str]:
    """For the terminal: the per-node table, requested and actual placement, and a warning if they differ."""
    table, shares = table_of(reports), row.get("numa_shares")
    if table is None or not shares:
        return []
    got = ", ".join(f"node {s['node']} {s['share']:.1%}" for s in shares if s["share"] is not None)
    asked = ", ".join(f"node {s['node']} {s['requested_share']:.1%}" for s in shares if s["requested_share"])
    said = [
        table.render(),
        f"ldft: memory policy {row['numa_policy']}: " + (f"asked {asked}; got {got}" if asked else f"got {got}"),
    ]
    if row.get("numa_mechanism") == "stripes" and row.get("cfg.numa.kind") == "weighted_interleave":
        said.append(
            "ldft: the kernel's weights could not be set (Linux 6.9 and root): offloaded tensors are striped by them instead, the "
            "rest of the process is interleaved evenly"
        )
    if any(entry["requested_share"] is not None for entry in row.get("roles") or ()):
        said += _role_lines(row["roles"])
    large = sum(s["added_gib"] for s in shares) * GIB > _WORTH_A_WARNING
    if asked and large and any(abs(s["share"] - s["requested_share"]) > _TOLERANCE for s in shares):
        causes = _drift(reports[0]).explain(_asked(reports[0]))
        said.append(
            "ldft: warning: memory is not on the nodes that numa= requests; the row has both shares (numa_shares)"
        )
        said += [f"ldft: warning: meanwhile {cause}" for cause in causes]
    return said
