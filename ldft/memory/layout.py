"""How a placement becomes policies over one range of memory: by the kernel as a whole, or by stripes with a policy
each.

Stripes. A range with a policy of its own is one mapping (VMA) for the kernel, and a process may have vm.max_map_count
of them (65530 by default), shared with everything else it maps. So stripes are huge pages (2 MiB), doubled until one
tensor has at most MOST_STRIPES of them and at most an eighth of what is left of our half of the process's limit: each
tensor leaves seven eighths to those after it, so that it never runs out. The stripe decides only how fine nodes
alternate, never the shares: these are exact to one page, since each node's remainder of less than a stripe follows at
the end (csrc/stripes.cpp).
"""

from dataclasses import dataclass, field
from pathlib import Path

from ldft import _native
from ldft.memory.policy import Placement, kernel_has_weights, kernel_policy
from ldft.memory.topology import Topology

MOST_STRIPES = 4096
_STRIPE = 2 << 20
_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
# The kernel's pattern is fixed by absolute addresses. A tensor holds whole cycles of it and one cut cycle, which puts a
# node off its share by at most weight * (1 - share) units. More than this part of the tensor, and more than one unit,
# is too much.
_KERNEL_ERROR = 256

Range = tuple[int, int, int]
"""(offset, bytes, node); node -1 wants nothing."""


@dataclass(kw_only=True, slots=True)
class Layout:
    """The policies over one region, and what they should lead to."""

    method: str
    """kernel: one policy; stripes: one a range; none: nothing is set."""
    policy: int = 0
    """The kernel's number of the one policy."""
    nodes: tuple[int, ...] = ()
    ranges: list[Range] = field(default_factory=list)
    """Covers the region: every range with the node that it wants."""
    allowed: frozenset[int] | None = None
    """Nodes that any page may be on; None: any."""
    shares: dict[int, float] | None = None
    """Shares that must come out within `tolerance` pages; None: open."""
    tolerance: float = 0

    def misplaced(self, pages: dict[int, int], outside_range: int) -> int:
        """Pages that are not where they were asked for.

        pages: found by node, those without memory under -1. outside_range: of those with memory, the ones on another node than
        their range wants.
        """
        if self.method == "none":
            return 0
        if all(node >= 0 for _, _, node in self.ranges):  # every page has a node of its own
            return outside_range + pages.get(-1, 0)
        outside = sum(count for node, count in pages.items() if self.allowed is not None and node not in self.allowed)
        if self.shares is None:
            return outside
        total = sum(pages.values())
        surplus = {n: pages.get(n, 0) - self.shares.get(n, 0) * total for n in {*pages, *self.shares}}
        if all(abs(x) <= self.tolerance for x in surplus.values()):
            return outside
        return max(1, round(sum(x for x in surplus.values() if x > 0)))


def plan(placement: Placement, topology: Topology, size: int, huge: bool, *, stripes: bool = False) -> Layout:
    """The layout of `size` bytes (whole pages) under a resolved placement; `stripes` insists on those for the
    interleaves."""
    whole = [(0, size, -1)]
    if placement.kind == "default":
        return Layout(method="none", ranges=whole)
    if placement.kind in ("bind", "preferred"):
        policy, nodes = kernel_policy(placement)
        if len(nodes) == 1:
            whole = [(0, size, nodes[0])]
        return Layout(method="kernel", policy=policy, nodes=nodes, ranges=whole, allowed=frozenset(nodes))
    weights = placement.weights or (1,) * len(placement.nodes)
    method = "stripes" if stripes else placement.method
    error = _kernel_error(weights, huge)
    if method == "auto":
        has = placement.kind == "interleave" or kernel_has_weights(placement, topology)
        method = (
            "kernel" if has and error <= max(_unit(huge), size // _native.page_size() / _KERNEL_ERROR) else "stripes"
        )
    if method == "kernel":
        policy, nodes = kernel_policy(placement)
        return Layout(
            method="kernel",
            policy=policy,
            nodes=nodes,
            ranges=whole,
            allowed=frozenset(nodes),
            shares=placement.shares(),
            tolerance=max(error, _unit(huge)) if len(nodes) > 1 else 0,
        )
    stripe = _native.stripe_bytes(size, _STRIPE, _most_ranges(len(placement.nodes)))
    ranges = _native.make_stripes(size, stripe, list(placement.nodes), list(weights))
    return Layout(method="stripes", ranges=ranges, allowed=frozenset(placement.nodes), shares=placement.shares())


def bytes_by_node(layout: Layout, size: int) -> dict[int, int] | None:
    """Bytes that the layout needs on each node; None where any of several nodes will do."""
    if layout.shares is not None and layout.method == "kernel":
        return {node: int(share * size) for node, share in layout.shares.items()}
    need: dict[int, int] = {}
    for _, length, node in layout.ranges:
        need[node] = need.get(node, 0) + length
    return None if -1 in need else need


def clip(ranges: list[Range], start: int, end: int) -> list[Range]:
    """The parts of ordered ranges that lie in [start, end)."""
    parts = []
    for offset, length, node in ranges:
        first, last = max(offset, start), min(offset + length, end)
        if first < last:
            parts.append((first, last - first, node))
    return parts


def _unit(huge: bool) -> int:
    """Pages that the kernel places together."""
    unit = _native.huge_page_size() if huge else 0
    return max(1, unit // _native.page_size())


def _kernel_error(weights: tuple[int, ...], huge: bool) -> float:
    """Pages that the kernel's interleave may put a node off its share, at most: see _KERNEL_ERROR."""
    total = sum(weights)
    return max(w * (1 - w / total) for w in weights) * _unit(huge)


def _most_ranges(nodes: int) -> int:
    try:
        limit = int(_MAP_COUNT.read_text())
    except (OSError, ValueError):
        limit = 65530
    left = max(0, limit // 2 - _native.usage()[2])
    # The remainders at the end are one range a node more.
    return max(1, min(MOST_STRIPES, left // 8) - nodes)
