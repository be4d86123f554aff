"""Placement strategies: each turns role sizes, node sets and budgets into weights by role and node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ldft.errors import ConfigError
from ldft.memory import bandwidths, cost_model
from ldft.memory.cost_model import DoesNotFit, reduced
from ldft.memory.topology import format_list
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
# Most latency-critical first: what the optimizer step streams most, then what only the GPU accesses (the paper's order).
PRIORITY = (
    "momentum",
    "variance",
    "master_gradients",
    "master_weights",
    "compute_weights",
    "activations",
    "compute_gradients",
)
# Accessed by copies only: for these, the strategy striped gives each rank its own CXL node. (Gradients that the update reads in
# compute precision are not among them.)
ALTERNATING = ("activations", "compute_gradients")
# The allocator's largest weight, hence the finest split.
_FINEST = 1 << 20

Weights = dict[str, dict[int, int]]
"""Role -> node -> integer weight."""


@dataclass(frozen=True, slots=True)
class Task:
    """The input of a strategy."""

    run: Selection
    sizes: dict[str, float]
    """Bytes of all ranks by role, for the roles placed by weights."""
    local: tuple[int, ...]
    cxl: tuple[int, ...]
    budgets: dict[tuple[int, ...], float]
    """Bytes that single nodes and the two sets may hold."""
    in_turns: float
    """Bytes of the roles assigned to the CXL nodes in turn."""


class Needs(Enum):
    """Which nodes a strategy requires."""

    any = 0
    several_nodes = 1
    cxl = 2


@dataclass(frozen=True, slots=True)
class Strategy:
    weights: Callable[[Task], Weights]
    """Raises DoesNotFit if the roles do not fit the budgets."""
    needs: Needs = Needs.any
    has_budgets: bool = False
    """Whether numa.local_budget_gib and numa.cxl_budget_gib have an effect."""
    in_turns: tuple[str, ...] = ()
    """Roles not placed by weights: each rank's go to one CXL node, assigned to the ranks in turn."""


def greedy(
    sizes: Mapping[str, float],
    local: Sequence[int],
    cxl: Sequence[int],
    local_budget: float,
    cxl_budget: float = float("inf"),
    priority: Sequence[str] = PRIORITY,
) -> Weights:
    """The paper's placement: fill local memory by priority up to its budget, put the rest in CXL; evenly within a set.

    A role that only partly fits is split: it takes exactly the remaining local budget (to one part in 2^20 over the sizes of both
    sets, never more), the rest goes to CXL. sizes and budgets in bytes, all ranks together. Raises DoesNotFit if the CXL budget is
    exceeded.
    """
    weights: Weights = {}
    left, beyond = local_budget, 0.0
    for role in sorted(sizes, key=lambda role: priority.index(role) if role in priority else len(priority)):
        size = sizes[role]
        share = min(1.0, left / size) if size > 0 and cxl else 1.0
        # All nodes of a set get the same weight, so that the set is filled evenly; no weight is above _FINEST.
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


def priority(run: Selection) -> tuple[str, ...]:
    """PRIORITY; where the update reads the gradients in compute precision, these have the place of the fp32 ones."""
    if not run.shares_gradients:
        return PRIORITY
    return tuple("compute_gradients" if role == "master_gradients" else role for role in PRIORITY[:-1])


def in_turns(run: Selection, strategy: Strategy, sizes: Mapping[str, float]) -> list[str]:
    """The roles of `sizes` that the strategy assigns to the CXL nodes in turn: only copies access them."""
    streamed = ("compute_gradients",) if run.shares_gradients else ()
    return [role for role in strategy.in_turns if role in sizes and role not in streamed]


def streams(run: Selection) -> cost_model.Streams:
    """A step's traffic, depending on the update kernel and the number of micro-batches."""
    # With ZeRO-1/2, ldft's kernel replaces one of DeepSpeed's three passes.
    once = cost_model.FUSED if run.shares_gradients else cost_model.STOCK
    if run.overlap_step:
        once = cost_model.overlapped(once)
    return cost_model.accumulated(once, run.config.train.gradient_accumulation_steps)


def _bandwidths(config: Config, nodes: tuple[int, ...]) -> cost_model.Bandwidths:
    """Bandwidths of the nodes where roles may go. Raises ConfigError if they are unknown."""
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
            f"node {missing[0]} is missing (nodes: {format_list(known.nodes())}); measure again, or add it",
        )
    return known.of(nodes)


def _even_room(nodes: tuple[int, ...], budgets: Mapping[tuple[int, ...], float]) -> float:
    """Bytes that can be spread evenly over a set: as much on each node as the smallest can take, within the set's budget."""
    if not nodes:
        return 0.0
    return min(len(nodes) * min(budgets[(node,)] for node in nodes), budgets.get(nodes, float("inf")))


def _evenly(nodes: tuple[int, ...]) -> Weights:
    return {role: dict.fromkeys(nodes, 1) for role in ROLES}


def _greedily(task: Task) -> Weights:
    room = _even_room(task.local, task.budgets), _even_room(task.cxl, task.budgets) - task.in_turns
    return greedy(task.sizes, task.local, task.cxl, *room, priority=priority(task.run))


def _optimally(task: Task) -> Weights:
    config = task.run.config
    known = _bandwidths(config, task.local + task.cxl)
    return cost_model.solve(task.sizes, known, task.budgets, config.launch.ranks_per_host, streams=streams(task.run))


# One entry for each member of NumaStrategy (ldft/config/numa.py).
STRATEGIES = {
    "local_only": Strategy(lambda task: _evenly(task.local)),
    "naive_interleaving": Strategy(lambda task: _evenly(task.local + task.cxl), Needs.several_nodes),
    "cxl_aware": Strategy(_greedily, Needs.cxl, has_budgets=True),
    "striped": Strategy(_greedily, Needs.cxl, has_budgets=True, in_turns=ALTERNATING),
    "optimal": Strategy(_optimally, Needs.several_nodes, has_budgets=True),
}
