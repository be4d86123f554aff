"""What single nodes and sets of nodes may hold, to the byte, and which nodes are in which set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ldft.memory.cost_model import DoesNotFit, shares_of
from ldft.memory.policy import Placement, PlacementError
from ldft.preflight import placement_text
from ldft.preflight.resolved import resolve
from ldft.preflight.role_placement import _budgets, node_sets, placement_of
from ldft.preflight.selection import select
from ldft.preflight.strategies import STRATEGIES, greedy, in_turns, priority
from tests.preflight.test_strategy_options import BANDWIDTH, GIB, assign, config, machine, on_nodes


def test_the_greedy_splits_to_one_part_in_a_million() -> None:
    assert greedy({"momentum": 2.0**20}, [0], [1], 3.0) == {"momentum": {0: 3, 1: 2**20 - 3}}
    assert greedy({"momentum": 2.0**20}, [0], [1], 0.9) == {"momentum": {1: 1}}, "never more than there is"


def test_what_fits_exactly_fits() -> None:
    size = {"momentum": 2.0 * GIB}
    assert greedy(size, [0], [1], 2 * GIB, 0.0) == greedy(size, [0], [], 2 * GIB, 0.0) == {"momentum": {0: 1}}
    assert greedy(size, [0], [1], 0, 2 * GIB) == {"momentum": {1: 1}}
    for local, cxl in ((2 * GIB - 1, []), (0, [1])):
        with pytest.raises(DoesNotFit):
            greedy(size, [0], cxl, local, 2 * GIB - 1)
    # Both parts count, of all roles.
    two = {"momentum": 2.0 * GIB, "variance": 2.0 * GIB}
    assert greedy(two, [0], [1], GIB, 3 * GIB)["variance"] == {1: 1}
    with pytest.raises(DoesNotFit):
        greedy(two, [0], [1], GIB, 3 * GIB - 4096)


def test_a_role_without_bytes_or_without_a_place_in_the_order() -> None:
    weights = greedy({"other": 4.0, "activations": 4.0, "momentum": 0.0, "variance": 4.0}, [0], [1], 6.0)
    assert shares_of(weights) == {
        "momentum": {0: 1.0},
        "variance": {0: 1.0},
        "activations": {0: 0.5, 1: 0.5},
        "other": {1: 1.0},
    }


def test_gradients_that_the_update_reads_have_the_place_of_the_fp32_ones() -> None:
    stock = select(config("striped", "optimizer.fused_step=false"))
    assert priority(stock).index("master_gradients") == 2 and priority(stock)[-1] == "compute_gradients"
    shared = select(config("striped"))
    assert priority(shared)[2] == "compute_gradients" and priority(shared)[-1] == "activations"
    sizes = {"momentum": 1.0, "activations": 1.0, "compute_gradients": 1.0}
    assert in_turns(stock, STRATEGIES["striped"], sizes) == ["activations", "compute_gradients"]
    assert in_turns(shared, STRATEGIES["striped"], sizes) == ["activations"]
    assert in_turns(stock, STRATEGIES["cxl_aware"], sizes) == []


def test_weights_become_the_simplest_placement() -> None:
    assert placement_of({0: 3, 1: 0}) == Placement(kind="bind", nodes=(0,))
    assert placement_of({2: 7, 1: 7, 0: 0}) == Placement(kind="interleave", nodes=(1, 2))
    stripes = Placement(kind="weighted_interleave", nodes=(0, 1), weights=(3, 1), method="stripes")
    assert placement_of({1: 1, 0: 3}) == stripes


def test_local_nodes_have_cpus_and_what_is_named_is_in_one_set() -> None:
    four = machine(local=2, cxl=2)

    def sets(*overrides: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return node_sets(config("cxl_aware", *overrides), four)

    assert sets() == ((0, 1), (2, 3))
    assert sets("numa.cxl_nodes=[1]") == ((0,), (1,))
    assert sets("numa.local_nodes=[0,2]") == ((0, 2), (3,))
    assert sets("numa.local_nodes=[1]", "numa.cxl_nodes=[3]") == ((1,), (3,))
    for key in ("local_nodes", "cxl_nodes"):
        with pytest.raises(PlacementError, match=rf"^numa\.{key}: node 7 does not exist"):
            sets(f"numa.{key}=[7]")


@pytest.mark.parametrize(("ranks", "local", "gib"), [(1, 2, 60), (2, 1, 80), (3, 2, 60)])
def test_the_processes_are_spread_over_the_local_nodes(ranks: int, local: int, gib: int) -> None:
    made, topology = config("cxl_aware", f"launch.num_ranks={ranks}"), machine(local=local, gib=gib)
    process = sum(resolve(made, topology=topology).estimate.others.values())
    held = on_nodes(made, topology)
    for node in range(local):
        assert held[node] == pytest.approx(gib * GIB * 31 / 32 - ranks * process / local, rel=1e-4)


def test_budgets_of_nodes_and_sets_to_the_byte() -> None:
    """80 GiB a node, of which a 32nd stays free, with two ranks that have 1000 bytes each beside the roles."""
    topology, node = machine(cxl=2, gib=80), 80 * GIB * 31 / 32
    by_hand = {"momentum": Placement(kind="bind", nodes=(1,)), "variance": Placement()}

    def budgets(local_gib: int) -> dict[tuple[int, ...], float]:
        keys = (f"numa.local_budget_gib={local_gib}", "numa.cxl_budget_gib=30", "launch.num_ranks=2")
        run = select(config("cxl_aware", *keys), topology=topology)
        return _budgets(run, (0,), (1, 2), by_hand, {"momentum": 7, "variance": 9}, 1000)

    alone = {(1,): node - 14, (2,): node, (1, 2): 30 * GIB - 14}
    assert budgets(0) == alone | {(0,): node - 2000}
    assert budgets(50) == alone | {(0,): 50 * GIB}
    assert budgets(100) == budgets(0), "a budget beyond the node's memory makes it no larger"


def test_a_role_by_hand_takes_its_part_of_its_nodes() -> None:
    made = config(
        "cxl_aware", "numa.roles.activations.nodes=[0,1]", "numa.roles.variance.nodes=[0]", "launch.num_ranks=2"
    )
    run = resolve(made, topology=machine(gib=80))
    process = 2 * sum(run.estimate.others.values())
    assert on_nodes(made, machine(gib=80))[0] == pytest.approx(80 * GIB * 31 / 32 - process, rel=1e-4)
    # The sets' budgets lose it too: 5 of 105 GiB go to CXL besides the 15 GiB by hand.
    by_hand = ("numa.local_budget_gib=100", "numa.roles.compute_weights.nodes=[1]")
    assert assign(config("cxl_aware", *by_hand, "numa.cxl_budget_gib=21"), machine())
    with pytest.raises(PlacementError, match=r"^numa\.strategy: cxl_aware: the roles need"):
        assign(config("cxl_aware", *by_hand, "numa.cxl_budget_gib=18"), machine())


def test_one_node_is_as_large_as_the_capacity_that_is_said() -> None:
    one = machine(cxl=0, gib=8)
    with pytest.raises(PlacementError, match=r"^numa\.strategy: "):
        assign(config("cxl_aware", "numa.cxl_nodes=[0]"), one)
    placements = assign(config("cxl_aware", "numa.cxl_nodes=[0]", "memory.capacity_gib=500"), one)[0]
    assert placements["momentum"] == Placement(kind="bind", nodes=(0,))
    with pytest.raises(PlacementError, match=r"^numa\.strategy: "):
        assign(config("cxl_aware", "memory.capacity_gib=500"), machine(gib=8))


def test_roles_in_turns_take_their_part_of_the_cxl_budget() -> None:
    line = ("striped", "launch.num_ranks=2", "seq_len=32k", "numa.local_budget_gib=104")
    made = config(*line, "numa.cxl_budget_gib=256")
    held = on_nodes(made, machine(cxl=2))
    cxl_gib = (held[1] + held[2]) / GIB
    assert assign(config(*line, f"numa.cxl_budget_gib={cxl_gib + 0.01}"), machine(cxl=2))
    with pytest.raises(PlacementError, match=r"^numa\.strategy: striped: the roles need"):
        assign(config(*line, f"numa.cxl_budget_gib={cxl_gib - 0.01}"), machine(cxl=2))


def test_the_smallest_node_limits_its_set() -> None:
    equal = machine(local=2, gib=60)
    small = replace(equal, nodes=(replace(equal.nodes[0], total_bytes=40 * GIB), *equal.nodes[1:]))
    made = config("cxl_aware")
    process = sum(resolve(made, topology=small).estimate.others.values())
    held = on_nodes(made, small)
    assert held[0] == held[1] == pytest.approx(40 * GIB * 31 / 32 - process / 2, rel=1e-4)


def test_only_strategies_with_budgets_take_them() -> None:
    for strategy in STRATEGIES:
        made = config(strategy, "numa.local_budget_gib=200", BANDWIDTH)
        text = "\n".join(placement_text.notes(resolve(made, topology=machine())))
        assert ("numa.local_budget_gib" in text) == (strategy in ("local_only", "naive_interleaving")), strategy
