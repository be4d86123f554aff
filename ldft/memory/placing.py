"""Reserve, place, touch and verify one region: the parts of an allocation that need neither a tensor nor torch."""

import logging
import os
import time
from dataclasses import dataclass

from ldft import _native
from ldft.memory.layout import Layout, Range, bytes_by_node, clip, plan
from ldft.memory.limits import free_memory, free_on_node
from ldft.memory.policy import HostMemoryError, Placement, is_forbidden, is_harmless, refused
from ldft.memory.topology import Topology, format_list

log = logging.getLogger(__name__)

# Check free memory again before each slice: other processes, including ranks of the same run, use it too.
SLICE = 2 << 30
# Below this size the check costs more than it protects: the reserve that free_memory keeps is larger.
_CHECK_FROM = 4 << 20
# A CPU clears 5 to 10 GB/s; this many threads reach the memory bandwidth of any socket.
_MOST_THREADS = 32
# Round 1 moves or splits huge pages, round 2 moves the split ones, round 3 covers interference by other processes.
_MENDING_ROUNDS = 3


@dataclass(kw_only=True, slots=True)
class Settings:
    """Settings for every allocation of this process."""

    huge_pages: bool = True
    """Request transparent huge pages; base pages where the kernel has none."""
    capacity_gib: float | None = None
    """Memory of this machine, GiB, for virtual machines that report less and grow as memory is touched; None: as the kernel
    reports."""


@dataclass(kw_only=True, slots=True)
class Report:
    """The placement requested for one tensor, and the result."""

    placement: Placement
    """As requested, with nodes filled in."""
    method: str
    """How it was placed: kernel (one policy), stripes (one policy per range), none (kind default)."""
    bytes_needed: int
    bytes_reserved: int
    """Whole pages; nothing else is reserved for the tensor."""
    ranges: int
    """Number of ranges with their own policy."""
    huge_pages: bool
    """Whether huge pages were requested and the kernel accepted; it decides how many to use."""
    pages: dict[int, int]
    """Base pages by node, as move_pages(2) reported after touching. Empty (not verified) if no nodes were requested (kind default)
    and the call is forbidden, as by Docker's default profile."""
    spilled_pages: int
    """Number of misplaced pages; 0 if strict."""
    pinned: bool = False
    place_s: float = 0.0
    touch_s: float = 0.0
    verify_s: float = 0.0
    register_s: float = 0.0


settings = Settings()


def place(
    placement: Placement, topology: Topology, needed: int, huge: bool, strict: bool
) -> tuple[_native.Region, Report]:
    """A region of at least `needed` bytes with a resolved placement, fully touched and verified.

    Raises, with nothing left allocated, HostMemoryError if memory is short, the kernel refuses, or, if `strict`, a page is
    misplaced; NumaCallError if a system call that the placement or its verification needs is forbidden.
    """
    page = _native.page_size()
    size = -(-needed // page) * page
    huge = huge and size >= max(1, _native.huge_page_size()) and _native.huge_page_size() > 0
    layout = plan(placement, topology, size, huge)
    region, report = _try(layout, placement, topology, needed, huge, strict)
    if report.spilled_pages and layout.method == "kernel" and layout.shares is not None and placement.method == "auto":
        # The kernel silently interleaves around a full node, and cannot be told which page to move. Stripes can.
        region.release()
        layout = plan(placement, topology, size, huge, stripes=True)
        region, report = _try(layout, placement, topology, needed, huge, strict)
    if report.spilled_pages:
        text = _miss(placement, report, topology)
        if strict and placement.kind != "preferred":
            region.release()
            raise HostMemoryError(f"{text}; nothing was kept. {_fix(placement)}")
        log.warning("%s", text)
    return region, report


def _try(
    layout: Layout, placement: Placement, topology: Topology, needed: int, huge: bool, strict: bool
) -> tuple[_native.Region, Report]:
    page = _native.page_size()
    size = -(-needed // page) * page
    if strict and placement.kind != "preferred":
        _require_free_nodes(layout, placement, topology, size)
    _require_free(placement, size)
    started = time.perf_counter()
    try:
        region = _native.Region(needed, huge)
    except OSError as error:
        raise HostMemoryError(
            f"{placement.describe()}: the kernel did not reserve {_gib(size)} of address space ({error.strerror}); "
            "see ulimit -v and vm.overcommit_memory"
        ) from error
    # On any error, dropping the region frees everything.
    try:
        if layout.method == "stripes":
            region.place_ranges(layout.ranges)
        elif layout.method == "kernel":
            region.place(layout.policy, list(layout.nodes))
    except OSError as error:
        if not is_harmless(error, placement, topology):
            region.release()
            raise refused(error, "mbind", placement.describe()) from error
    placed = time.perf_counter()
    _touch(region, layout, placement, topology, size)
    touched = time.perf_counter()
    pages, wrong = _verify(region, layout, placement, topology, size)
    for _ in range(_MENDING_ROUNDS):
        # Without room, moving pages cannot help, and trying makes the kernel search the node for pages to reclaim.
        if wrong == 0 or not _has_room(layout, placement, size, pages, wrong):
            break
        before = wrong
        region.bring_home(layout.ranges)
        # A huge page that cannot be moved whole is split, and since Linux 6.12 the kernel drops those of its pages that are
        # all zero. Touched once more, they come back as base pages, which the next round can move one by one.
        _touch(region, layout, placement, topology, size)
        pages, wrong = _verify(region, layout, placement, topology, size)
        if wrong == before and -1 not in pages:
            break
    report = Report(
        placement=placement,
        method=layout.method,
        bytes_needed=needed,
        bytes_reserved=region.bytes,
        ranges=len(layout.ranges),
        huge_pages=region.huge,
        pages=pages,
        spilled_pages=wrong,
        place_s=placed - started,
        touch_s=touched - placed,
        verify_s=time.perf_counter() - touched,
    )
    return region, report


def _has_room(layout: Layout, placement: Placement, size: int, pages: dict[int, int], wrong: int) -> bool:
    """Whether the misplaced pages would fit on their target nodes: each node's missing pages on that node, or, if any of the nodes
    will do, all of them on the nodes together."""
    page = _native.page_size()
    free = {node: free_on_node(node) or 0 for node in placement.nodes}
    need = bytes_by_node(layout, size)
    if need is None:
        return wrong * page <= sum(free.values())
    return all(need.get(node, 0) - pages.get(node, 0) * page <= free[node] for node in placement.nodes)


def _touch(region: _native.Region, layout: Layout, placement: Placement, topology: Topology, size: int) -> None:
    usable = frozenset(os.sched_getaffinity(0))
    for start in range(0, size, SLICE):
        end = min(size, start + SLICE)
        if start > 0:
            try:
                _require_free(placement, size - start)
            except HostMemoryError:
                region.release()
                raise
        region.touch(_groups(clip(layout.ranges, start, end), layout, topology, usable))


def _groups(
    ranges: list[Range], layout: Layout, topology: Topology, usable: frozenset[int]
) -> list[tuple[list[Range], list[int], int]]:
    """Ranges with the CPUs that touch them: of the CPUs this process may use, those nearest to the range's node.

    A range without a requested node is touched from the CPUs nearest to all its allowed nodes; for kind default (the process
    policy), from the CPUs of the node on which the caller runs, as memset would.
    """
    by_cpus: dict[tuple[int, ...], list[Range]] = {}
    for item in ranges:
        if item[2] >= 0:
            nodes = [item[2]]
        elif layout.nodes:
            nodes = list(layout.nodes)
        else:
            nodes = [_own_node(topology)]
        cpus = sorted({cpu for node in nodes for cpu in topology.cpus_nearest(node, usable)})
        by_cpus.setdefault(tuple(cpus), []).append(item)
    return [(items, list(cpus), min(_MOST_THREADS, max(1, len(cpus)))) for cpus, items in by_cpus.items()]


def _own_node(topology: Topology) -> int:
    cpu = _native.current_cpu()
    return next((node.id for node in topology.nodes if cpu in node.cpus), topology.nodes[0].id)


def _verify(
    region: _native.Region, layout: Layout, placement: Placement, topology: Topology, size: int
) -> tuple[dict[int, int], int]:
    """Pages by node, and the number of misplaced ones. No pages: the kernel forbids the query, and no nodes were requested."""
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    try:
        pages, absent, outside = region.census(layout.ranges, threads)
    except OSError as error:
        if is_harmless(error, Placement(), topology):
            return {topology.nodes[0].id: size // _native.page_size()}, 0
        if is_forbidden(error) and placement.kind == "default":
            return {}, 0
        region.release()
        raise refused(error, "move_pages", f"verifying {placement.describe()}") from error
    if absent:  # already swapped out, or an unexpected kernel: not a reliable placement
        pages[-1] = absent
    return pages, layout.misplaced(pages, outside)


def _require_free(placement: Placement, size: int) -> None:
    """Refuse an allocation that would get the process killed while touching it."""
    if size < _CHECK_FROM:
        return
    capacity = None if settings.capacity_gib is None else int(settings.capacity_gib * 2**30)
    free = free_memory(capacity)
    if size > free.bytes:
        raise HostMemoryError(
            f"{placement.describe()}: {_gib(size)} more requested, {_gib(free.bytes)} free by {free.limit}; request less, free "
            "memory, or, if the machine grows as memory is touched, set memory.capacity_gib"
        )


def _require_free_nodes(layout: Layout, placement: Placement, topology: Topology, size: int) -> None:
    """Refuse an allocation that cannot fit on its nodes, before touching any of it.

    On a machine with one node, the whole-machine check does this, and handles machines that grow.
    """
    if len(topology.nodes) == 1 or layout.method == "none" or size < _CHECK_FROM:
        return
    free = {node: free_on_node(node) or 0 for node in placement.nodes}
    need = bytes_by_node(layout, size)
    short = need is None and size > sum(free.values())
    if need is not None:
        short = any(need.get(node, 0) > free[node] for node in placement.nodes)
    if short:
        each = need or {}
        rooms = ", ".join(
            f"node {n}: {_gib(each[n])} of {_gib(free[n])}" if n in each else f"node {n}: {_gib(free[n])}"
            for n in placement.nodes
        )
        raise HostMemoryError(
            f"{placement.describe()}: {_gib(size)} requested does not fit ({rooms} free); nothing was touched. {_fix(placement)}"
        )


def _miss(placement: Placement, report: Report, topology: Topology) -> str:
    page = _native.page_size()
    found = ", ".join(f"node {n}: {_gib(count * page)}" for n, count in report.pages.items())
    free = ", ".join(f"node {n}: {_gib(free_on_node(n) or 0)}" for n in topology.memory_nodes)
    return (
        f"{placement.describe()}: {_gib(report.spilled_pages * page)} of {_gib(report.bytes_reserved)} went elsewhere "
        f"(got {found}; now free {free})"
    )


def _fix(placement: Placement) -> str:
    nodes = format_list(placement.nodes)
    return f"Request less, free memory on node {nodes}, choose other nodes, or allow spilling (strict=False)"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"
