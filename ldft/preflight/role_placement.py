"""Chooses the placement of each role, rank by rank. Imports no torch: the parent calls it before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ldft.memory.cost_model import DoesNotFit
from ldft.memory.kernel_weights import can_weight
from ldft.memory.policy import Placement, PlacementError
from ldft.memory.topology import Topology, format_list
from ldft.preflight import host_estimate
from ldft.preflight.selection import Selection
from ldft.preflight.strategies import ROLES, STRATEGIES, Needs, Task, in_turns

if TYPE_CHECKING:
    from ldft.config import Config

# Fraction of a node's memory left to the system.
_RESERVE = 1 / 32


def assign(run: Selection, sizes: Mapping[str, int], others: Mapping[str, int]) -> list[dict[str, Placement]]:
    """Role -> resolved placement, one dict per rank. Kind default: the process policy decides.

    sizes, others: expected bytes of a rank in host memory, by role and besides the roles. numa.roles overrides the strategy, which
    places the other roles. Raises PlacementError that names the key if a placement does not fit the machine or the roles do not
    fit the budgets.
    """
    asked = {
        role: placement.resolve(run.topology, f"numa.roles.{role}")
        for role, placement in run.config.numa.roles.placements().items()
    }
    planned = _by_strategy(run, sizes, sum(others.values()), asked)
    rest = stripes_of_process(run) or Placement()
    return [{role: asked.get(role) or of.get(role) or rest for role in ROLES} for of in planned]


def stripes_of_process(run: Selection) -> Placement | None:
    """The process's weighted placement if striped arenas must replace the kernel's weights, which exist since Linux 6.9, once per
    machine, and only root can change. None if the kernel can apply the weights, or if there are no arenas to stripe."""
    config = run.config
    if config.numa.placement.kind != "weighted_interleave":
        return None
    placement = config.numa.placement.resolve(run.topology, "numa")
    if can_weight(placement, run.topology) or not host_estimate.host_bytes(run) or not run.uses_arenas:
        return None
    return replace(placement, method="stripes")


def node_sets(config: Config, topology: Topology) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nodes of local and of CXL memory, as configured or by default. Raises PlacementError if they do not exist."""
    numa = config.numa
    local = tuple(numa.local_nodes) or tuple(n for n in topology.memory_nodes if topology.node(n).cpus)
    cxl = tuple(numa.cxl_nodes)
    if not cxl:
        cxl = tuple(n for n in topology.memory_nodes if not topology.node(n).cpus and n not in local)
    for key, nodes in (("local_nodes", local), ("cxl_nodes", cxl)):
        if nodes:
            try:
                Placement(kind="interleave", nodes=nodes).resolve(topology, "")
            except PlacementError as error:
                raise PlacementError(f"numa.{key}", str(error).partition(": ")[2]) from None
    return tuple(n for n in local if n not in numa.cxl_nodes), cxl


def _by_strategy(
    run: Selection, expected: Mapping[str, int], process: int, asked: dict[str, Placement]
) -> list[dict[str, Placement]]:
    config, topology = run.config, run.topology
    name, ranks = config.numa.strategy.name, config.launch.ranks_per_host
    if name == "none":
        return [{} for _ in range(ranks)]
    strategy = STRATEGIES[name]
    local, cxl = node_sets(config, topology)
    if not cxl and (strategy.needs is Needs.cxl or (strategy.needs is Needs.several_nodes and len(local) < 2)):
        raise PlacementError(
            "numa.cxl_nodes",
            f"no node without CPUs here (nodes with memory: {format_list(topology.memory_nodes)}), which numa.strategy={name} "
            f"needs; {'name nodes of another socket' if len(topology.memory_nodes) > 1 else 'use numa=local_only'}, or see README, "
            '"Trying it without NUMA hardware"',
        )
    sizes = {role: float(ranks * size) for role, size in expected.items() if role not in asked}
    budgets = _budgets(run, local, cxl, asked, expected, process)
    turns = in_turns(run, strategy, sizes)
    rest = {role: size for role, size in sizes.items() if role not in turns}
    try:
        weights = strategy.weights(Task(run, rest, local, cxl, budgets, sum(sizes[role] for role in turns)))
    except DoesNotFit as error:
        raise PlacementError(
            "numa.strategy",
            f"{name}: {error} on nodes {format_list(local + cxl)}; raise numa.local_budget_gib or numa.cxl_budget_gib, or use "
            "a smaller model",
        ) from None
    fixed = {role: placement_of(of) for role, of in weights.items()}
    return [fixed | {role: placement_of({cxl[rank % len(cxl)]: 1}) for role in turns} for rank in range(ranks)]


def placement_of(weights: Mapping[int, int]) -> Placement:
    """The placement equivalent to integer weights by node."""
    nodes = tuple(sorted(node for node, weight in weights.items() if weight > 0))
    if len(nodes) == 1:
        return Placement(kind="bind", nodes=nodes)
    if len({weights[node] for node in nodes}) == 1:
        return Placement(kind="interleave", nodes=nodes)
    return Placement(
        kind="weighted_interleave", nodes=nodes, weights=tuple(weights[node] for node in nodes), method="stripes"
    )


def _budgets(
    run: Selection,
    local: tuple[int, ...],
    cxl: tuple[int, ...],
    asked: Mapping[str, Placement],
    sizes: Mapping[str, int],
    beside: int,
) -> dict[tuple[int, ...], float]:
    """Bytes that single nodes and the two sets may hold of the roles that the strategy places."""
    config, topology, ranks = run.config, run.topology, run.config.launch.ranks_per_host
    process = ranks * beside
    taken: dict[int, float] = {}
    for role, placement in asked.items():
        for node, share in (placement.shares() or {}).items():
            taken[node] = taken.get(node, 0.0) + ranks * sizes.get(role, 0) * share
    found: dict[tuple[int, ...], float] = {}
    for nodes, own, given in ((local, process, config.numa.local_budget_gib), (cxl, 0, config.numa.cxl_budget_gib)):
        for node in nodes:
            total = topology.node(node).total_bytes
            if len(topology.nodes) == 1:
                total = max(total, int(config.memory.capacity_gib * 2**30))
            found[(node,)] = max(0.0, total * (1 - _RESERVE) - own / len(nodes) - taken.get(node, 0.0))
        if given > 0 and nodes:
            budget = max(0.0, given * 2**30 - sum(taken.get(node, 0.0) for node in nodes))
            found[nodes] = min(budget, found.get(nodes, budget))  # a set of one node holds no more than the node
    return found
