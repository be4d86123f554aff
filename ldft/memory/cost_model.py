"""Modelled time of a step's host-memory traffic, and the placement that minimises it. Imports neither torch nor Hydra.

The cost model. A stream over several nodes processes each node's share in parallel, so the slowest node decides; GPU copies are
also limited by the GPU's link:

    T = max( max over nodes (bytes on the node / rate of the node alone), bytes of one GPU / rate of its link )

Published measurements on a CXL expander agree with it (docs/numa.md). A step has three phases in sequence. Copies in both
directions run concurrently, so a phase takes as long as its slowest stream:

    optimizer   CPU: the update reads gradients, reads and writes master weights and moments, and writes 16-bit weights
    forward     to the GPU: weights; from it: layer inputs
    backward    to the GPU: weights, layer inputs, gradients read back to accumulate; from it: gradients, by stock DeepSpeed in
                fp32 too

Forward and backward repeat for every accumulated micro-batch. An update beside the next forward pass (optimizer.overlap_step)
is one more stream of that phase, of the first micro-batch only, instead of a phase of its own.
GPU compute is not modelled: it hides copies, equally for every placement. It hides an overlapped update as well, so what the model
says of that is an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

Shares = dict[str, dict[int, float]]
"""Role -> node -> share of the role's bytes, summing to 1."""

Streams = Mapping[tuple[str, str], Mapping[str, float]]
"""(phase, cpu or copy direction) -> role -> accesses to each stored byte."""

# Stock DeepSpeed (0.19, ZeRO-3) with one micro-batch. The optimizer unscales gradients (read, write) and reads them for the update;
# it reads and writes master weights and reads them again for the 16-bit copy; it reads and writes moments. Sums over all phases:
# master gradients 4, master and compute weights 3, all others 2.
STOCK: Streams = {
    ("optimizer", "cpu"): {
        "master_gradients": 3,
        "master_weights": 3,
        "momentum": 2,
        "variance": 2,
        "compute_weights": 1,
    },
    ("forward", "h2d"): {"compute_weights": 1},
    ("forward", "d2h"): {"activations": 1},
    ("backward", "h2d"): {"compute_weights": 1, "activations": 1, "compute_gradients": 1},
    ("backward", "d2h"): {"compute_gradients": 1, "master_gradients": 1},
}
# With ldft's update (optimizer.fused_step) under ZeRO-3, unscaling and the 16-bit copy happen in the same pass, and the gradients
# are those in compute precision.
FUSED: Streams = dict(STOCK) | {
    ("optimizer", "cpu"): {
        "compute_gradients": 1,
        "master_weights": 2,
        "momentum": 2,
        "variance": 2,
        "compute_weights": 1,
    },
    ("backward", "d2h"): {"compute_gradients": 1},
}
# Written once the last micro-batch is accumulated (stage3.py, _offload_grad_partition_at_boundary).
_ONCE = "master_gradients"
# Forward passes of accumulated micro-batches after the first, where the first has the update beside it.
_LATER = "later forward"
# Shares are rounded to multiples of 1/PARTS and become integer weights.
PARTS = 10_000


class DoesNotFit(ValueError):
    """The roles need more memory than the budgets allow."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Bandwidths:
    """Rates of one machine, bytes per second."""

    cpu: dict[int, float]
    """By node: rate of an optimizer step on all cores with its data on that node alone."""
    h2d: dict[int, float]
    """By node: rate of copies from that node alone to the GPUs, all GPUs together."""
    d2h: dict[int, float]
    """By node: rate of copies from the GPUs to that node alone, all GPUs together."""
    link_h2d: float
    """Highest rate of copies to one GPU, from any nodes."""
    link_d2h: float
    """Highest rate of copies from one GPU, to any nodes."""

    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted(self.cpu))

    def of(self, nodes: tuple[int, ...]) -> Bandwidths:
        """The same rates, restricted to these nodes."""
        cpu, h2d, d2h = ({node: rates[node] for node in nodes} for rates in (self.cpu, self.h2d, self.d2h))
        return Bandwidths(cpu=cpu, h2d=h2d, d2h=d2h, link_h2d=self.link_h2d, link_d2h=self.link_d2h)

    def rates(self, engine: str) -> tuple[dict[int, float], float]:
        """Rates by node, and the link's, of `cpu`, `h2d` or `d2h`."""
        if engine == "cpu":
            return self.cpu, float("inf")
        return (self.h2d, self.link_h2d) if engine == "h2d" else (self.d2h, self.link_d2h)


def phases(streams: Streams) -> tuple[str, ...]:
    """The phases of a step, in order."""
    return tuple(dict.fromkeys(phase for phase, _ in streams))


def update_of(streams: Streams) -> Mapping[str, float]:
    """Role -> accesses of the update to each stored byte."""
    return next(accesses for (_, engine), accesses in streams.items() if engine == "cpu")


def overlapped(streams: Streams) -> Streams:
    """The traffic of a step whose update runs beside the next forward pass."""
    return {
        ("forward" if engine == "cpu" else phase, engine): accesses for (phase, engine), accesses in streams.items()
    }


def accumulated(streams: Streams, micro_batches: int) -> Streams:
    """The traffic of a step that accumulates `micro_batches`, from the traffic of a step with one."""
    found: dict[tuple[str, str], Mapping[str, float]] = {}
    later: dict[tuple[str, str], Mapping[str, float]] = {}
    for (phase, engine), accesses in streams.items():
        if engine == "cpu":
            found[phase, engine] = accesses
        elif (phase, "cpu") in streams:
            found[phase, engine] = accesses
            later[_LATER, engine] = {role: times * (micro_batches - 1) for role, times in accesses.items()}
        else:
            repeats = {role: 1 if role == _ONCE else micro_batches for role in accesses}
            found[phase, engine] = {role: times * repeats[role] for role, times in accesses.items()}
    return found | (later if micro_batches > 1 else {})


def stream_s(
    size: float, shares: Mapping[int, float], rates: Mapping[int, float], link: float = float("inf"), gpus: int = 1
) -> float:
    """Seconds for `size` bytes spread over nodes by `shares`; `link`: bytes per second of each of the `gpus`."""
    alone = max((size * share / rates[node] for node, share in shares.items() if share > 0), default=0.0)
    return max(alone, size / gpus / link)


def step_s(
    sizes: Mapping[str, float], shares: Shares, bandwidths: Bandwidths, gpus: int = 1, *, streams: Streams = STOCK
) -> dict[str, float]:
    """Seconds of a step's host traffic by phase. sizes: bytes by role, all ranks together; one GPU a rank."""
    seconds = dict.fromkeys(phases(streams), 0.0)
    for (phase, engine), accesses in streams.items():
        traffic: dict[int, float] = {}
        for role, times in accesses.items():
            for node, share in shares.get(role, {}).items():
                traffic[node] = traffic.get(node, 0.0) + times * sizes.get(role, 0.0) * share
        rates, link = bandwidths.rates(engine)
        total = sum(traffic.values())
        if total > 0:
            parts = {node: size / total for node, size in traffic.items()}
            seconds[phase] = max(seconds[phase], stream_s(total, parts, rates, link, gpus))
    return seconds


def solve(
    sizes: Mapping[str, float],
    bandwidths: Bandwidths,
    budgets: Mapping[tuple[int, ...], float],
    gpus: int = 1,
    *,
    streams: Streams = STOCK,
) -> dict[str, dict[int, int]]:
    """The placement with the shortest modelled step: role -> node -> integer weight; nodes with no share are left out.

    sizes: bytes by role, all ranks together. budgets: bytes that each set of nodes may hold in total; nodes in no set are
    unlimited. Raises DoesNotFit.
    """
    # Leave room for the bytes that rounding to PARTS can add to a node.
    shares, _ = _program(sizes, bandwidths, budgets, gpus, streams, spare=1 / PARTS)
    return {role: rounded(of) for role, of in shares.items()}


def bound_s(
    sizes: Mapping[str, float],
    bandwidths: Bandwidths,
    budgets: Mapping[tuple[int, ...], float],
    gpus: int = 1,
    *,
    streams: Streams = STOCK,
) -> float:
    """Lower bound of the modelled step, seconds, over all placements within the budgets: the optimum of the linear program."""
    return _program(sizes, bandwidths, budgets, gpus, streams, spare=0.0)[1]


def _program(
    sizes: Mapping[str, float],
    bandwidths: Bandwidths,
    budgets: Mapping[tuple[int, ...], float],
    gpus: int,
    streams: Streams,
    spare: float,
) -> tuple[Shares, float]:
    """Shares and seconds by linear programming.

    Minimise the sum of t[phase], where t[phase] >= the time of each of the phase's streams on each node and on the link. The
    shares x[role, node] >= 0 of a role sum to 1, and bytes stay within every budget less, per node, `spare` of all bytes.
    """
    # Imported here because a rank must set its memory policy before anything imports numpy.
    import numpy as np
    from scipy.optimize import linprog

    roles = [role for role, size in sizes.items() if size > 0]
    nodes = bandwidths.nodes()
    if not roles:
        return {}, 0.0
    total = sum(sizes[role] for role in roles)
    count = len(roles) * len(nodes)
    column = {(role, node): i for i, (role, node) in enumerate((r, n) for r in roles for n in nodes)}
    # Scaled to suit the solver's tolerances: times are in units of all bytes over all rates.
    unit_s = total / sum(bandwidths.cpu.values())
    names = phases(streams)
    least = [0.0] * len(names)
    rows = []
    limits = []
    for (phase, engine), accesses in streams.items():
        rates, link = bandwidths.rates(engine)
        at = names.index(phase)
        least[at] = max(least[at], sum(n * sizes.get(role, 0.0) for role, n in accesses.items()) / gpus / link / unit_s)
        for node in nodes:
            row = np.zeros(count + len(names))
            for role, times in accesses.items():
                if (role, node) in column:
                    row[column[role, node]] = times * sizes[role] / rates[node] / unit_s
            row[count + at] = -1.0
            rows.append(row)
            limits.append(0.0)
    for members, budget in budgets.items():
        row = np.zeros(count + len(names))
        for role in roles:
            for node in members:
                row[column[role, node]] = sizes[role] / total
        rows.append(row)
        limits.append(budget / total - len(members) * spare)
    whole = np.zeros((len(roles), count + len(names)))
    for i in range(len(roles)):
        whole[i, i * len(nodes) : (i + 1) * len(nodes)] = 1.0
    found = linprog(
        np.concatenate([np.zeros(count), np.ones(len(names))]),
        A_ub=np.array(rows),
        b_ub=np.array(limits),
        A_eq=whole,
        b_eq=np.ones(len(roles)),
        bounds=[(0.0, 1.0)] * count + [(low, None) for low in least],
        method="highs",
    )
    if found.status != 0:
        need, have = total / 2**30, sum(budgets.values()) / 2**30
        raise DoesNotFit(f"the roles need {need:.1f} GiB, the budgets give {have:.1f} GiB")
    shares = found.x[:count].reshape(len(roles), len(nodes))
    return {r: dict(zip(nodes, map(float, shares[i]), strict=True)) for i, r in enumerate(roles)}, found.fun * unit_s


def rounded(shares: Mapping[int, float]) -> dict[int, int]:
    """Integer weights, in lowest terms, for shares that sum to 1; each is less than 1/PARTS off."""
    exact = {node: max(0.0, share) * PARTS for node, share in shares.items()}
    weights = {node: int(part + 1e-6) for node, part in exact.items()}
    left = PARTS - sum(weights.values())
    for node in sorted(exact, key=lambda node: weights[node] - exact[node])[:left]:
        weights[node] += 1
    return reduced(weights)


def reduced(weights: Mapping[int, int]) -> dict[int, int]:
    """The same ratio in lowest terms, without nodes of weight 0."""
    divisor = gcd(*weights.values())
    return {node: weight // divisor for node, weight in weights.items() if weight > 0}


def shares_of(weights: Mapping[str, Mapping[int, int]]) -> Shares:
    """The shares that weights stand for."""
    return {role: {n: w / sum(of.values()) for n, w in of.items()} for role, of in weights.items()}
