"""How a placement becomes kernel policies over one range of memory: one policy for the range, or stripes with one policy each.

Stripes. The kernel keeps each range with its own policy as a mapping (VMA), and a process may have vm.max_map_count of them
(65530 by default), shared with everything else it maps. A stripe is therefore one huge page (2 MiB), doubled until a tensor has at
most MOST_STRIPES stripes and uses at most an eighth of the mappings left in ldft's half of the limit: each tensor leaves seven
eighths to later ones, so the half never runs out. The stripe size affects only how finely nodes alternate, not the shares: these
are exact to one page, since each node's remainder of less than a stripe follows at the end (csrc/stripes.cpp).
"""

from dataclasses import dataclass, field
from pathlib import Path

from ldft import _native
from ldft.memory.policy import Placement, kernel_has_weights, kernel_policy
from ldft.memory.topology import Topology

MOST_STRIPES = 4096
_STRIPE = 2 << 20
_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
# The kernel's interleave pattern is fixed by absolute addresses. A tensor spans whole cycles and one partial cycle, which shifts a
# node's share by at most weight * (1 - share) units. An error above one unit and above this fraction of the tensor is too large.
_KERNEL_ERROR = 256

Range = tuple[int, int, int]
"""(offset, bytes, node); node -1: no node requested."""


@dataclass(kw_only=True, slots=True)
class Layout:
    """The policies over one region, and the placement they should produce."""

    method: str
    """kernel: one policy; stripes: one policy per range; none: no policy is set."""
    policy: int = 0
    """The kernel's number for the policy, with mechanism kernel."""
    nodes: tuple[int, ...] = ()
    ranges: list[Range] = field(default_factory=list)
    """Ranges that cover the region, each with its requested node."""
    allowed: frozenset[int] | None = None
    """Nodes on which any page may be; None: all nodes."""
    shares: dict[int, float] | None = None
    """Shares that must hold within `tolerance` pages; None: no shares requested."""
    tolerance: float = 0

    def misplaced(self, pages: dict[int, int], outside_range: int) -> int:
        """Number of misplaced pages.

        pages: counts found by node, with pages that have no memory under -1. outside_range: number of pages that have memory but on
        a node other than their range's.
        """
        if self.method == "none":
            return 0
        if all(node >= 0 for _, _, node in self.ranges):  # every page has a requested node
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
    """The layout of `size` bytes (whole pages) with a resolved placement; `stripes` forces stripes for the interleaves."""
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
    """Bytes that the layout needs on each node; None if pages may be on any of several nodes."""
    if layout.shares is not None and layout.method == "kernel":
        return {node: int(share * size) for node, share in layout.shares.items()}
    need: dict[int, int] = {}
    for _, length, node in layout.ranges:
        need[node] = need.get(node, 0) + length
    return None if -1 in need else need


def clip(ranges: list[Range], start: int, end: int) -> list[Range]:
    """The parts of ordered ranges within [start, end)."""
    parts = []
    for offset, length, node in ranges:
        first, last = max(offset, start), min(offset + length, end)
        if first < last:
            parts.append((first, last - first, node))
    return parts


def _unit(huge: bool) -> int:
    """Number of base pages that the kernel places together."""
    unit = _native.huge_page_size() if huge else 0
    return max(1, unit // _native.page_size())


def _kernel_error(weights: tuple[int, ...], huge: bool) -> float:
    """Largest deviation from a node's share, in pages, of the kernel's interleave: see _KERNEL_ERROR."""
    total = sum(weights)
    return max(w * (1 - w / total) for w in weights) * _unit(huge)


def _most_ranges(nodes: int) -> int:
    try:
        limit = int(_MAP_COUNT.read_text())
    except (OSError, ValueError):
        limit = 65530
    left = max(0, limit // 2 - _native.usage()[2])
    # The remainders at the end add one range per node.
    return max(1, min(MOST_STRIPES, left // 8) - nodes)
