"""A machine that is not here (the group `machine`), as the checks see it: GPUs, NUMA nodes, memory and bandwidths. Imports no
torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ldft import environment
from ldft.config import THIS, Config, Device, HostLayout, MachineConfig
from ldft.memory.topology import Node, Topology, read_topology

GIB = 2**30
# What training sustains of a datasheet's bandwidth: the update of host memory's, which is assumed, and copies of the link's, 0.85
# of which were measured (benchmarks/results/nodes-h200.parquet).
_OF_HOST, _OF_LINK = 0.8, 0.86


def assumed(config: Config) -> AbstractContextManager[None]:
    """Within the context the GPUs are those of config.machine or, where launch.device=cuda asks for GPUs that this machine lacks,
    assumed ones of memory.vram_gib. Raises ConfigError for a machine that cannot be."""
    config.check_numbers()
    machine = config.machine
    machine.validate()
    if machine.name != THIS:
        capability = (machine.capability[0], machine.capability[1])
        given = environment.Assumed(
            machine.gpus, machine.vram_gib, model=machine.gpu, capability=capability, host_gib=_host_gib(machine)
        )
        return environment.assumed(given)
    if config.launch.device is Device.cuda and not environment.gpus():
        return environment.assumed(environment.Assumed(config.launch.ranks_per_host, config.memory.vram_gib or None))
    return nullcontext()


def topology(config: Config) -> Topology:
    """The nodes of config.machine, or of this machine."""
    machine = config.machine
    if machine.name == THIS:
        return read_topology()
    sizes = _sizes(machine)
    count = sum(1 for cores, _, _ in sizes if cores)
    first, nodes = 0, []
    for id, (cores, size, _) in enumerate(sizes):
        distances = {
            other: 10 if other == id else 21 if other < count and id < count else 24 for other in range(len(sizes))
        }
        nodes.append(Node(id=id, cpus=tuple(range(first, first + cores)), total_bytes=size, distances=distances))
        first += cores
    gpus = {f"0000:{number + 1:02x}:00.0": number * count // machine.gpus for number in range(machine.gpus)}
    ids = tuple(node.id for node in nodes)
    return Topology(nodes=tuple(nodes), gpus=gpus, weights=dict.fromkeys(ids, 1), weights_auto=None, allowed=ids)


def bandwidth(machine: MachineConfig) -> dict[str, Any]:
    """Its bandwidths by node, in the form of numa.bandwidth."""
    link = _OF_LINK * machine.link_gb_per_s
    found: dict[str, Any] = {"link": {"h2d": link, "d2h": link}}
    for id, (_, _, rate) in enumerate(_sizes(machine)):
        found[f"node{id}"] = {"cpu": _OF_HOST * rate, "h2d": min(link, rate), "d2h": min(link, rate)}
    return found


def _sizes(machine: MachineConfig) -> list[tuple[int, int, float]]:
    """Cores, bytes, and GB/s of each node."""
    count = 1 if machine.host is HostLayout.one_node else 2
    size = int(machine.host_gib * GIB / count)
    nodes = [(machine.cores // count, size, machine.host_gb_per_s / count)] * count
    if machine.host is HostLayout.two_nodes_cxl:
        nodes.append((0, int(machine.cxl_gib * GIB), machine.cxl_gb_per_s))
    return nodes


def _host_gib(machine: MachineConfig) -> float:
    return sum(size for _, size, _ in _sizes(machine)) / GIB
