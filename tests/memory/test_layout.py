"""How a placement becomes policies: stripes for every page, the kernel where it is exact enough."""

import random
from dataclasses import replace

import pytest

from ldft import _native
from ldft.memory import layout, placing
from ldft.memory.layout import MOST_STRIPES, bytes_by_node, clip, plan
from ldft.memory.policy import Placement
from ldft.memory.topology import read_topology

PAGE, HUGE, GIB = 4096, 2 << 20, 1 << 30


@pytest.fixture
def topology(sysfs, status):
    return read_topology(sysfs, status)


def weighted(nodes, weights, method="auto"):
    return Placement(kind="weighted_interleave", nodes=nodes, weights=weights, method=method)


@pytest.mark.parametrize("weights", [(1, 2), (5, 2), (255, 1), (1, 1), (1, 1000)])
@pytest.mark.parametrize("size", [PAGE, 3 * PAGE, HUGE, 16 << 20, (256 << 20) + PAGE, 70 * GIB])
def test_stripes_give_every_node_its_pages_exactly(topology, weights, size):
    found = plan(weighted((0, 2), weights, "stripes"), topology, size, True)
    assert found.method == "stripes"
    at = 0
    for offset, length, _ in found.ranges:
        assert offset == at and length > 0 and length % PAGE == 0
        at += length
    assert at == size
    need = bytes_by_node(found, size)
    assert need is not None
    for node, weight in zip((0, 2), weights, strict=True):
        assert abs(need.get(node, 0) - size * weight / sum(weights)) < PAGE
    assert len(found.ranges) <= MOST_STRIPES


def test_shares_say_how_many_pages_are_misplaced():
    """By how many the nodes with too many exceed their shares, and never none if any share is missed."""
    anywhere = [(0, 8 * PAGE, -1)]
    asked = layout.Layout(method="kernel", ranges=anywhere, shares={0: 0.5, 2: 0.5}, allowed=frozenset({0, 2}))
    assert asked.misplaced({0: 4, 2: 4}, 0) == 0
    assert asked.misplaced({0: 5, 2: 4}, 0) == 1 and asked.misplaced({0: 7, 2: 1}, 0) == 3
    assert asked.misplaced({0: 3, 2: 3, 1: 2}, 0) == 2


def test_the_kernels_interleave_needs_its_shares_on_each_node(topology):
    found = plan(weighted((0, 2), (1, 3), "kernel"), replace(topology, weights={0: 1, 2: 3}), 256 << 20, False)
    assert found.method == "kernel" and bytes_by_node(found, 256 << 20) == {0: 64 << 20, 2: 192 << 20}
    anywhere = plan(Placement(kind="preferred", nodes=(0, 2)), topology, 256 << 20, False)
    assert bytes_by_node(anywhere, 256 << 20) is None


def test_three_nodes_and_whole_huge_pages(topology):
    found = plan(weighted((0, 1, 2), (1, 2, 3), "stripes"), topology, 256 << 20, True)
    assert bytes_by_node(found, 256 << 20) == pytest.approx(
        {0: (256 << 20) / 6, 1: (256 << 20) / 3, 2: 128 << 20}, abs=PAGE
    )
    short = [length for _, length, _ in found.ranges if length % HUGE]
    assert len(short) <= 3  # only each node's remainder cuts a huge page


def test_mappings_never_run_out(topology, monkeypatch):
    used = 0
    monkeypatch.setattr(_native, "usage", lambda: (0, 0, used))
    limit = int(layout._MAP_COUNT.read_text())
    for _ in range(2000):  # two thousand tensors of 64 GiB each
        found = plan(weighted((0, 2), (1, 2), "stripes"), topology, 64 * GIB, True)
        used += len(found.ranges)
        need = bytes_by_node(found, 64 * GIB)
        assert need is not None and need[0] == pytest.approx(64 * GIB / 3, abs=PAGE)
    assert used < 0.6 * limit


def test_a_tensor_leaves_seven_eighths_of_half_the_mappings(tmp_path, monkeypatch):
    def ranges(limit, used, nodes=2):
        (tmp_path / "limit").write_text(str(limit))
        monkeypatch.setattr(layout, "_MAP_COUNT", tmp_path / "limit")
        monkeypatch.setattr(_native, "usage", lambda: (0, 0, used))
        return layout._most_ranges(nodes)

    assert ranges(65530, 0) == 4095 - 2 and ranges(1 << 20, 0) == MOST_STRIPES - 2
    assert ranges(65530, 32765 - 800) == 100 - 2 and ranges(65530, 32765 - 800, nodes=4) == 100 - 4
    assert ranges(65530, 32765) == ranges(65530, 99999) == 1
    assert ranges("none", 0) == ranges(65530, 0)


def test_the_kernels_error_that_is_just_small_enough(topology):
    """Weights of 6:6, of a kernel that has 1:1: a cut cycle shifts three pages, and 1/256 of a tensor is as much from 768 on."""
    for pages, method in ((767, "stripes"), (768, "kernel")):
        assert plan(weighted((0, 1), (6, 6)), topology, pages * PAGE, False).method == method
    # One page, or one huge page, is always small enough: of two nodes by one to one, a cut cycle shifts half.
    assert plan(weighted((0, 1), (1, 1)), topology, 2 * PAGE, False).method == "kernel"
    assert plan(weighted((0, 2), (1, 2)), topology, HUGE, True).method == "kernel"


def test_the_kernel_interleaves_where_it_is_exact_enough(topology):
    def method(placement, size, huge):
        return plan(placement, topology, size, huge).method

    assert method(Placement(kind="interleave", nodes=(0, 2)), 16 << 20, True) == "kernel"
    assert method(weighted((0, 2), (1, 2)), 16 << 20, False) == "kernel"  # its weights are 1:1:2
    assert method(weighted((0, 2), (1, 3)), 16 << 20, False) == "stripes"  # not its weights
    assert (
        method(weighted((0, 2), (100, 200)), 1 << 20, False) == "stripes"
    )  # a cut cycle of 300 pages is too much of 256
    assert method(weighted((0, 2), (1, 2), "stripes"), 16 << 20, False) == "stripes"


def test_what_counts_as_misplaced(topology):
    one = plan(Placement(kind="bind", nodes=(2,)), topology, 16 << 20, True)
    assert one.ranges == [(0, 16 << 20, 2)]
    assert one.misplaced({2: 4096}, 0) == 0
    assert one.misplaced({2: 4090, 0: 6}, 6) == 6
    striped = plan(weighted((0, 2), (1, 1), "stripes"), topology, 128 << 20, True)
    assert striped.misplaced({0: 24576, 2: 7680, -1: 512}, 8192) == 8704
    assert striped.misplaced({0: 16384, 2: 16384}, 2) == 2  # the right shares in the wrong places
    several = plan(Placement(kind="bind", nodes=(0, 2)), topology, 16 << 20, True)
    assert several.ranges == [(0, 16 << 20, -1)]
    assert several.misplaced({0: 96, 2: 4000}, 0) == 0
    assert several.misplaced({0: 96, 1: 4000}, 0) == 4000
    both = plan(Placement(kind="interleave", nodes=(0, 2)), topology, 16 << 20, False)
    assert both.misplaced({0: 2048, 2: 2048}, 0) == 0
    assert both.misplaced({0: 2049, 2: 2047}, 0) == 0  # the cut cycle
    assert both.misplaced({0: 2050, 2: 2046}, 0) == 2
    assert both.misplaced({0: 4096}, 0) == 2048
    assert both.misplaced({0: 2048, 2: 2047, -1: 1}, 0) == 1  # a page without memory is nowhere
    assert plan(Placement(), topology, 16 << 20, True).misplaced({0: 4096}, 0) == 0
    # A half page too much on each of three nodes of four: what each lacks or has too much is counted, however little.
    four = layout.Layout(method="kernel", ranges=[(0, 4098, -1)], shares=dict.fromkeys(range(4), 0.25), tolerance=1)
    assert four.misplaced({0: 1025, 1: 1025, 2: 1025, 3: 1023}, 0) == 2
    assert four.misplaced({0: 1025, 1: 1025, 2: 1024, 3: 1024}, 0) == 0


def test_clipping_keeps_every_byte():
    rng = random.Random(1)
    ranges = _native.make_stripes(64 << 20, HUGE, [0, 3], [1, 2])
    for _ in range(100):
        start, end = sorted(rng.sample(range(0, 64 << 20, PAGE), 2))
        parts = clip(ranges, start, end)
        assert sum(length for _, length, _ in parts) == end - start
        assert parts[0][0] == start
        assert all(any(o <= p[0] < o + n and p[2] == node for o, n, node in ranges) for p in parts)


def test_what_is_elsewhere_is_sent_home_only_where_each_node_has_room_for_what_it_lacks(topology, monkeypatch):
    """Of 96 MiB, a third belongs on node 0 and the rest on node 2. Room on one node is no help to what belongs on the other."""
    size, wrong = 96 << 20, 8192
    pages = {0: 16384, 2: 8192}  # 32 MiB of node 2's are on node 0

    def has_room(placement, free):
        monkeypatch.setattr(placing, "free_on_node", free.get)
        return placing._has_room(plan(placement, topology, size, False), placement, size, pages, wrong)

    striped = weighted((0, 2), (1, 2), "stripes")
    assert has_room(striped, {0: 0, 2: 32 << 20})
    assert not has_room(striped, {0: GIB, 2: (32 << 20) - PAGE})
    # Both nodes full, and each has what belongs on the other: nothing is lacking, pages can change places.
    pages = {0: 8192, 2: 16384}
    assert has_room(striped, {0: 0, 2: 0})
