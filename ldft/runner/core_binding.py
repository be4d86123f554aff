"""Which cores each rank gets: none is idle, all serve the nearest GPU, two ranks never share one core's threads. Without torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from ldft import environment
from ldft.memory.topology import SYSFS, Node, Topology, parse_list, read_topology


def cores_of_ranks(num_ranks: int, device: str = "cpu", sysfs: Path = SYSFS) -> list[list[int]]:
    """CPUs of every rank, of those that this process may use. Ranks on cuda use the visible GPUs in their order."""
    usable = frozenset(os.sched_getaffinity(0))
    addresses = environment.gpu_addresses()[:num_ranks] if device == "cuda" else ()
    return split(num_ranks, addresses, read_topology(sysfs), physical_cores(usable, sysfs))


def physical_cores(usable: frozenset[int], sysfs: Path = SYSFS) -> list[tuple[int, ...]]:
    """The usable CPUs, hardware threads of one core together, in the order of each core's first."""
    cores: dict[tuple[int, ...], None] = {}
    for cpu in sorted(usable):
        path = sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings = parse_list(path.read_text()) if path.is_file() else (cpu,)
        cores[tuple(sorted(usable & {cpu, *siblings}))] = None
    return list(cores)


def split(
    num_ranks: int, addresses: Sequence[str], topology: Topology, cores: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """Every core works for a GPU that is as near as any: ranks whose GPUs hang on one node share its cores, and those of nodes
    without GPUs that are nearest to it. Nodes as near to two nodes with GPUs are shared out between them, by their ranks.

    A core of another node of the socket is far nearer than an idle one, and its memory controller counts, too.

    addresses: PCI address of each rank's GPU, as sysfs writes it. Where it does not say which node every GPU is on, or they are all
    on the same one, all ranks share all cores evenly: binding to one socket would leave the other idle.
    """
    nodes = [topology.gpus.get(address, -1) for address in addresses]
    owner = {cpu: node for node in topology.nodes for cpu in node.cpus}
    with_cores = {owner[core[0]].id for core in cores if core[0] in owner}
    known = {node.id for node in topology.nodes}
    if len(nodes) < num_ranks or len(set(nodes)) < 2 or not known.issuperset(nodes) or not with_cores:
        return _evenly(num_ranks, cores)
    # GPUs of nodes without (usable) cores are served by the nearest that has some, perhaps several of them by the same one.
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
    """The candidate that the node is itself, else all that are nearest to it; None, a node not known, is as near to each."""
    if node is not None and node.id in candidates:
        return (node.id,)
    distance = {id: node.distances.get(id, 255) if node else 255 for id in candidates}
    return tuple(id for id in sorted(candidates) if distance[id] == min(distance.values()))


def _evenly(num_ranks: int, cores: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Consecutive cores for each; with fewer cores than ranks, ranks share them in turn."""
    if len(cores) < num_ranks:
        return [list(cores[rank % len(cores)]) for rank in range(num_ranks)]
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    return [sorted(itertools.chain.from_iterable(cores[a:b])) for a, b in itertools.pairwise(bounds)]
