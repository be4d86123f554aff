"""Assigns cores to ranks: no core is idle, each serves its nearest GPU, and two ranks never share one core's hardware threads.
Imports no torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from ldft import environment
from ldft.memory.topology import SYSFS, Node, Topology, parse_list, read_topology


def cores_of_ranks(num_ranks: int, device: str = "cpu", sysfs: Path = SYSFS) -> list[list[int]]:
    """CPUs of every rank, from those that this process may use. On cuda, ranks use the visible GPUs in order."""
    usable = frozenset(os.sched_getaffinity(0))
    addresses = environment.gpu_addresses()[:num_ranks] if device == "cuda" else ()
    return split(num_ranks, addresses, read_topology(sysfs), physical_cores(usable, sysfs))


def physical_cores(usable: frozenset[int], sysfs: Path = SYSFS) -> list[tuple[int, ...]]:
    """The usable CPUs, grouped by core, ordered by each core's first hardware thread."""
    cores: dict[tuple[int, ...], None] = {}
    for cpu in sorted(usable):
        path = sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings = parse_list(path.read_text()) if path.is_file() else (cpu,)
        cores[tuple(sorted(usable & {cpu, *siblings}))] = None
    return list(cores)


def split(
    num_ranks: int, addresses: Sequence[str], topology: Topology, cores: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """Assign every core to one of its nearest GPUs: ranks with GPUs on one node share that node's cores and the cores of the nodes
    without GPUs that are nearest to it. A node equally near to several nodes with GPUs is divided among their ranks.

    Cores of the socket's other nodes are included: using them beats leaving them idle, and adds their memory controllers.

    addresses: PCI address of each rank's GPU, in sysfs's form. If some GPU's node is unknown, or all GPUs are on one node, all
    ranks share all cores evenly: binding to one socket would leave the other idle.
    """
    nodes = [topology.gpus.get(address, -1) for address in addresses]
    owner = {cpu: node for node in topology.nodes for cpu in node.cpus}
    with_cores = {owner[core[0]].id for core in cores if core[0] in owner}
    known = {node.id for node in topology.nodes}
    if len(nodes) < num_ranks or len(set(nodes)) < 2 or not known.issuperset(nodes) or not with_cores:
        return _evenly(num_ranks, cores)
    # GPUs on nodes without usable cores get the nearest node that has some; several of them may share one.
    homes = [_nearest(topology.node(node), with_cores)[0] for node in nodes]
    pools: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for core in cores:
        pools.setdefault(_nearest(owner.get(core[0]), set(homes)), []).append(core)
    mine: dict[int, list[tuple[int, ...]]] = {home: [] for home in homes}
    for tied, pool in pools.items():
        ranks = sorted(home for home in homes if home in tied)
        for number, home in enumerate(ranks):
            mine[home] += pool[number * len(pool) // len(ranks) : (number + 1) * len(pool) // len(ranks)]
    parts = {home: iter(_evenly(homes.count(home), sorted(mine[home]))) for home in mine}
    return [next(parts[home]) for home in homes]


def _nearest(node: Node | None, candidates: set[int]) -> tuple[int, ...]:
    """The node itself if it is a candidate, else all candidates nearest to it; None (unknown node) is equally near to all."""
    if node is not None and node.id in candidates:
        return (node.id,)
    distance = {id: node.distances.get(id, 255) if node else 255 for id in candidates}
    return tuple(id for id in sorted(candidates) if distance[id] == min(distance.values()))


def _evenly(num_ranks: int, cores: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Consecutive cores for each rank; with fewer cores than ranks, ranks share cores in turn."""
    if len(cores) < num_ranks:
        return [list(cores[rank % len(cores)]) for rank in range(num_ranks)]
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    return [sorted(itertools.chain.from_iterable(cores[a:b])) for a, b in itertools.pairwise(bounds)]
