"""Which cores each rank gets: those near its GPU, never one core's two hardware threads for two ranks. Without torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from ldft import environment
from ldft.memory.topology import SYSFS, Topology, parse_list, read_topology


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
    """Ranks whose GPUs hang on one node share the cores nearest to it evenly.

    addresses: PCI address of each rank's GPU, as sysfs writes it. Where it does not say which node every GPU is on, or they are all
    on the same one, all ranks share all cores evenly: binding to one socket would leave the other idle.
    """
    nodes = [topology.gpus.get(address, -1) for address in addresses]
    known = {node.id for node in topology.nodes}
    if len(nodes) < num_ranks or len(set(nodes)) < 2 or not known.issuperset(nodes):
        return _evenly(num_ranks, cores)
    usable = frozenset(itertools.chain.from_iterable(cores))
    near = {node: frozenset(topology.cpus_nearest(node, usable)) for node in nodes}
    if not all(near.values()):
        return _evenly(num_ranks, cores)
    found: list[list[int]] = [[] for _ in range(num_ranks)]
    # By the CPUs, not by the node: GPUs of two nodes without CPUs may be served by the same socket.
    for cpus in set(near.values()):
        ranks = [rank for rank in range(num_ranks) if near[nodes[rank]] == cpus]
        mine = [core for core in cores if cpus.issuperset(core)] or [(cpu,) for cpu in sorted(cpus)]
        for rank, part in zip(ranks, _evenly(len(ranks), mine), strict=True):
            found[rank] = part
    return found


def _evenly(num_ranks: int, cores: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Consecutive cores for each; with fewer cores than ranks, ranks share them in turn."""
    if len(cores) < num_ranks:
        return [list(cores[rank % len(cores)]) for rank in range(num_ranks)]
    bounds = [rank * len(cores) // num_ranks for rank in range(num_ranks + 1)]
    return [sorted(itertools.chain.from_iterable(cores[a:b])) for a, b in itertools.pairwise(bounds)]
