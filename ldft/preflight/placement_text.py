"""A run's placement by role as text, with the modelled time of its host-memory traffic. Imports no torch."""

from __future__ import annotations

import sys
from functools import cache

from ldft.errors import ConfigError
from ldft.memory import bandwidths, cost_model
from ldft.memory.policy import Placement, process_policy
from ldft.preflight.resolved import Resolved
from ldft.preflight.strategies import ROLES, STRATEGIES, streams


def gib(size: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def lines(run: Resolved) -> list[str]:
    """The ranks' policy; then, if roles have placements, role -> nodes, shares and bytes for rank 0 and for ranks that differ.

    Raises PlacementError, like `role_placement.assign`.
    """
    config = run.config
    found = [f"memory policy of the ranks (numa={config.numa.name}): {_of_process(run)}"]
    if not config.numa.by_role:
        return found
    ranks, sizes = run.placements, run.estimate.roles
    found.append("placement by role, each rank:")
    for role in (role for role in ROLES if sizes.get(role)):
        found.append(f"  {role}: {_text(ranks[0][role], sizes[role])}")
        found += [
            f"    rank {rank}: {_text(placements[role], sizes[role])}"
            for rank, placements in enumerate(ranks)
            if placements[role] != ranks[0][role]
        ]
    seconds = modelled_s(run)
    if seconds:
        parts = ", ".join(f"{phase} {value:.3f}" for phase, value in seconds.items())
        found.append(f"modelled traffic to host memory, s per step: {sum(seconds.values()):.3f} ({parts})")
    return found


def _of_process(run: Resolved) -> str:
    config, topology = run.config, run.topology
    if config.numa.placement.kind == "default":
        inherited = process_policy(topology)
        return "the kernel's default" if inherited.kind == "default" else f"{inherited.describe()}, the caller's"
    striped = " (offloaded tensors in stripes)" if run.stripes else ""
    return config.numa.placement.resolve(topology, "numa").describe() + striped


def notes(run: Resolved) -> list[str]:
    """Notes on placement keys that have no effect here. Not errors: in a sweep, the same keys apply to every policy."""
    numa, sizes = run.config.numa, run.estimate.roles
    strategy = STRATEGIES.get(numa.strategy.name)
    budgeted = strategy is not None and strategy.has_budgets
    found = [
        f"numa.{key}={getattr(numa, key):g} has no effect with numa={numa.name}, which has no budget; use one of "
        f"{', '.join(name for name, one in STRATEGIES.items() if one.has_budgets)}"
        for key in ("local_budget_gib", "cxl_budget_gib")
        if getattr(numa, key) and not budgeted
    ]
    absent = [role for role in numa.roles.placements() if not sizes.get(role)]
    if absent:
        found.append(f"numa.roles: no {', no '.join(absent)} in host memory here, so those keys have no effect")
    return found


def modelled_s(run: Resolved) -> dict[str, float]:
    """Seconds of a step's host-memory traffic by phase; empty if bandwidths or a role's nodes are unknown.

    A damaged machine profile is ignored with a warning: only numa.strategy=optimal needs it.
    """
    config, topology = run.config, run.topology
    try:
        known = bandwidths.bandwidths(config.numa.bandwidth)
    except ConfigError as error:
        if config.numa.bandwidth or config.numa.strategy.name == "optimal":
            raise
        known = None
        _warn(str(error))
    if known is None:
        return {}
    ranks, sizes = run.placements, run.estimate.roles
    process = config.numa.placement.resolve(topology, "numa")
    shares: cost_model.Shares = {}
    for placements in ranks:
        for role in sizes:
            of = (process if placements[role].kind == "default" else placements[role]).shares()
            if of is None and len(topology.memory_nodes) == 1:
                of = {topology.memory_nodes[0]: 1.0}
            if of is None or not set(of) <= set(known.nodes()):
                return {}
            into = shares.setdefault(role, {})
            for node, share in of.items():
                into[node] = into.get(node, 0.0) + share / len(ranks)
    total = {role: len(ranks) * size for role, size in sizes.items()}
    return cost_model.step_s(total, shares, known, len(ranks), streams=streams(run))


@cache
def _warn(problem: str) -> None:
    """Print a warning once per process, however many cells a sweep has."""
    print(f"ldft: {problem}; modelled times are left out", file=sys.stderr, flush=True)


def _text(placement: Placement, size: int) -> str:
    shares = placement.shares()
    if shares is None:
        return f"{placement.describe()}, {gib(size)}"
    return ", ".join(f"node {node} {share:.1%} ({gib(share * size)})" for node, share in shares.items())
