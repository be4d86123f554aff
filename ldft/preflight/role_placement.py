"""Which placement each role of tensors gets, rank by rank. Without torch: the parent asks before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ldft.errors import ConfigError
from ldft.memory import bandwidths, cost_model
from ldft.memory.cost_model import DoesNotFit, reduced
from ldft.memory.kernel_weights import can_weight
from ldft.memory.policy import Placement, PlacementError
from ldft.memory.topology import Topology, format_list
from ldft.preflight import host_estimate
from ldft.preflight.selection import Selection

if TYPE_CHECKING:
    from ldft.config import Config

ROLES = (
    "master_weights",
    "master_gradients",
    "momentum",
    "variance",
    "compute_weights",
    "compute_gradients",
    "activations",
)
# Most latency-critical first: what the optimizer step streams most of, then what the GPU alone touches (the paper's order).
PRIORITY = (
    "momentum",
    "variance",
    "master_gradients",
    "master_weights",
    "compute_weights",
    "activations",
    "compute_gradients",
)
# Touched by copies alone: what the strategy striped gives each rank a CXL node of its own for.
ALTERNATING = ("activations", "compute_gradients")
# Part of a node's memory that is left to the system.
_RESERVE = 1 / 32
# The allocator's largest weight: the finest split.
_FINEST = 1 << 20

Weights = dict[str, dict[int, int]]
"""Role -> node -> integer weight."""


def greedy(
    sizes: Mapping[str, float],
    local: Sequence[int],
    cxl: Sequence[int],
    local_budget: float,
    cxl_budget: float = float("inf"),
) -> Weights:
    """The paper's placement: by PRIORITY into local memory until its budget is full, the rest into CXL; evenly within a set.

    The role that does not fit as a whole is split: what is left of the budget locally, not a byte more (to one part in 2^20 over
    the sizes of both sets, and never above). sizes and budgets in bytes, all ranks together. Raises DoesNotFit where the CXL
    budget is exceeded.
    """
    weights: Weights = {}
    left, beyond = local_budget, 0.0
    for role in sorted(sizes, key=_rank):
        size = sizes[role]
        share = min(1.0, left / size) if size > 0 and cxl else 1.0
        # Those of each node of a set are the same, so that a set of several is even; none is above _FINEST.
        scale = max(1, len(local)) * max(1, len(cxl))
        parts = _FINEST // scale
        near = int(share * parts)
        far = parts - near
        of = dict.fromkeys(local, near * scale // max(1, len(local)))
        of |= dict.fromkeys(cxl, far * scale // max(1, len(cxl)))
        weights[role] = reduced(of)
        left = left - size if far == 0 else 0.0
        beyond += size * far / parts
    if beyond > cxl_budget or left < 0:
        raise DoesNotFit(
            f"the roles need {sum(sizes.values()) / 2**30:.1f} GiB, the budgets give {(local_budget + cxl_budget) / 2**30:.1f} GiB"
        )
    return weights


def _rank(role: str) -> int:
    return PRIORITY.index(role) if role in PRIORITY else len(PRIORITY)


def assign(run: Selection, sizes: Mapping[str, int], others: Mapping[str, int]) -> list[dict[str, Placement]]:
    """Role -> resolved placement, one dict a rank. Kind default: wherever the policy of the process puts it.

    sizes, others: expected bytes of a rank in host memory, by role and beside the roles. Placements by hand come first, the
    strategy has the other roles. Raises PlacementError, which names the key, where a placement does not suit the machine or the
    budgets do not hold the roles.
    """
    asked = {
        role: placement.resolve(run.topology, f"numa.roles.{role}")
        for role, placement in run.config.numa.roles.placements().items()
    }
    planned = _by_strategy(run, sizes, sum(others.values()), asked)
    rest = stripes_of_process(run) or Placement()
    return [{role: asked.get(role) or of.get(role) or rest for role in ROLES} for of in planned]


def stripes_of_process(run: Selection) -> Placement | None:
    """The weighted placement of the process, where stripes of the arenas have to stand in for the kernel's weights: those are one
    set a machine, since Linux 6.9, and root's to change. None where the kernel can, or where there are no arenas to stripe."""
    config = run.config
    if config.numa.placement.kind != "weighted_interleave":
        return None
    placement = config.numa.placement.resolve(run.topology, "numa")
    if can_weight(placement, run.topology) or not host_estimate.host_bytes(config) or not run.uses_arenas:
        return None
    return replace(placement, method="stripes")


def node_sets(config: Config, topology: Topology) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Nodes of local and of CXL memory, as configured or by default. Raises PlacementError where they do not exist."""
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
    strategy, ranks = config.numa.strategy.name, config.launch.num_ranks
    if strategy == "none":
        return [{} for _ in range(ranks)]
    local, cxl = node_sets(config, topology)
    if strategy != "local_only" and not cxl and (strategy in ("cxl_aware", "striped") or len(local) < 2):
        raise PlacementError(
            "numa.cxl_nodes",
            f"no node without CPUs here (nodes with memory: {format_list(topology.memory_nodes)}), which numa.strategy={strategy} "
            f"needs; {'name nodes of another socket' if len(topology.memory_nodes) > 1 else 'use numa=local_only'}, or see README, "
            '"Trying it without NUMA hardware"',
        )
    if strategy in ("local_only", "naive_interleaving"):
        even = placement_of(dict.fromkeys(local if strategy == "local_only" else local + cxl, 1))
        return [dict.fromkeys(ROLES, even) for _ in range(ranks)]
    sizes = {role: float(ranks * size) for role, size in expected.items() if role not in asked and size > 0}
    budgets = _budgets(run, local, cxl, asked, expected, process)
    turns = [role for role in ALTERNATING if strategy == "striped" and role in sizes]
    try:
        if strategy == "optimal":
            known = _bandwidths(config, local + cxl)
            weights = cost_model.solve(sizes, known, budgets, ranks, streams=streams(run))
        else:
            aside = sum(sizes[role] for role in turns)
            rest = {role: size for role, size in sizes.items() if role not in turns}
            weights = greedy(rest, local, cxl, _even_room(local, budgets), _even_room(cxl, budgets) - aside)
    except DoesNotFit as error:
        raise PlacementError(
            "numa.strategy",
            f"{strategy}: {error} on nodes {format_list(local + cxl)}; raise numa.local_budget_gib or numa.cxl_budget_gib, or use "
            "a smaller model",
        ) from None
    fixed = {role: placement_of(of) for role, of in weights.items()}
    return [fixed | dict.fromkeys(turns, placement_of({cxl[rank % len(cxl)]: 1})) for rank in range(ranks)]


def placement_of(weights: Mapping[int, int]) -> Placement:
    """The placement that says the same as integer weights by node."""
    nodes = tuple(sorted(node for node, weight in weights.items() if weight > 0))
    if len(nodes) == 1:
        return Placement(kind="bind", nodes=nodes)
    if len({weights[node] for node in nodes}) == 1:
        return Placement(kind="interleave", nodes=nodes)
    return Placement(
        kind="weighted_interleave", nodes=nodes, weights=tuple(weights[node] for node in nodes), method="stripes"
    )


def streams(run: Selection) -> cost_model.Streams:
    """A step's traffic, by who updates and how many micro-batches it takes."""
    # Under ZeRO-1/2 ldft's kernel is one pass of DeepSpeed's three.
    once = cost_model.FUSED if run.fused_step and run.config.offload.stage == 3 else cost_model.STOCK
    return cost_model.accumulated(once, run.config.train.gradient_accumulation_steps)


def _bandwidths(config: Config, nodes: tuple[int, ...]) -> cost_model.Bandwidths:
    """Those of the nodes that roles may go to. Raises ConfigError where they are not known."""
    known = bandwidths.bandwidths(config.numa.bandwidth)
    if known is None:
        raise ConfigError(
            bandwidths.KEY,
            "numa.strategy=optimal needs bandwidths by node, and this machine has no profile; measure them with "
            "python -m ldft.bench nodes, or give numa.bandwidth",
        )
    missing = [node for node in nodes if node not in known.cpu]
    if missing:
        raise ConfigError(
            bandwidths.KEY,
            f"node {missing[0]} is not in it (nodes: {format_list(known.nodes())}); measure again, or give it",
        )
    return known.of(nodes)


def _budgets(
    run: Selection,
    local: tuple[int, ...],
    cxl: tuple[int, ...],
    asked: Mapping[str, Placement],
    sizes: Mapping[str, int],
    beside: int,
) -> dict[tuple[int, ...], float]:
    """Bytes that single nodes and the two sets may hold of the roles that the strategy has."""
    config, topology, ranks = run.config, run.topology, run.config.launch.num_ranks
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
            found[nodes] = max(0.0, given * 2**30 - sum(taken.get(node, 0.0) for node in nodes))
    return found


def _even_room(nodes: tuple[int, ...], budgets: Mapping[tuple[int, ...], float]) -> float:
    """Bytes that can be spread evenly over a set: as much on each as the smallest takes, within the set's budget."""
    if not nodes:
        return 0.0
    return min(len(nodes) * min(budgets[(node,)] for node in nodes), budgets.get(nodes, float("inf")))
