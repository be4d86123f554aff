"""What each strategy places where."""

from __future__ import annotations

import random

import pytest

from ldft.memory.cost_model import DoesNotFit, shares_of
from ldft.memory.topology import Node, Topology
from ldft.preflight.role_placement import placement_of
from ldft.preflight.strategies import greedy

GIB = 2**30


def test_the_greedy_makes_the_published_plan() -> None:
    """8.3e9 parameters, Adam, 100 GiB of DRAM on node 0, 256 GiB of CXL on node 1 (example of the paper's repository)."""
    fp32, half = 4 * 8.3e9, 2 * 8.3e9
    sizes = dict.fromkeys(("compute_weights", "compute_gradients"), half) | {"activations": 20 * GIB}
    sizes |= dict.fromkeys(("master_weights", "master_gradients", "momentum", "variance"), fp32)
    weights = greedy(sizes, [0], [1], 100 * GIB, 256 * GIB)
    assert {role: sorted(of) for role, of in weights.items()} == {
        "momentum": [0],
        "variance": [0],
        "master_gradients": [0],
        "master_weights": [0, 1],
        "compute_weights": [1],
        "activations": [1],
        "compute_gradients": [1],
    }
    held = 3 * fp32 + fp32 * shares_of(weights)["master_weights"][0]
    assert 100 * GIB - fp32 / 2**20 <= held <= 100 * GIB


def test_the_greedy_spreads_evenly_over_the_nodes_of_a_set() -> None:
    weights = greedy({"momentum": 100.0, "variance": 100.0, "activations": 50.0}, [0, 1], [2, 5], 150.0)
    shares = shares_of(weights)
    assert shares["momentum"] == {0: 0.5, 1: 0.5} and shares["activations"] == {2: 0.5, 5: 0.5}
    assert shares["variance"] == pytest.approx(dict.fromkeys((0, 1, 2, 5), 0.25), abs=1e-5)


@pytest.mark.parametrize(("local", "cxl"), [(1, 1), (2, 1), (1, 2), (4, 1), (4, 2), (2, 4), (3, 5)])
def test_its_weights_are_ones_that_the_allocator_takes(local: int, cxl: int) -> None:
    """Wherever the budget cuts a role, on machines of any number of nodes."""
    nodes = tuple(Node(id=n, cpus=(), total_bytes=GIB, distances={}) for n in range(local + cxl))
    here = tuple(range(local + cxl))
    machine = Topology(nodes=nodes, gpus={}, weights={}, weights_auto=None, allowed=here)
    chance = random.Random(local * 10 + cxl)
    for _ in range(300):
        sizes = {role: chance.uniform(1, 100) * GIB for role in ("momentum", "variance", "activations")}
        budget = chance.uniform(0, 1.1) * sum(sizes.values())
        weights = greedy(sizes, here[:local], here[local:], budget)
        for of in weights.values():
            placement_of(of).resolve(machine, "")
        held = sum(sizes[role] * of.get(node, 0.0) for role, of in shares_of(weights).items() for node in here[:local])
        wanted = min(budget, sum(sizes.values()))
        assert wanted - max(sizes.values()) * local * cxl / 2**19 <= held <= wanted * (1 + 1e-12)


def test_the_greedy_refuses_what_the_budgets_do_not_hold() -> None:
    with pytest.raises(DoesNotFit, match=r"need 3.0 GiB, the budgets give 2.5 GiB"):
        greedy({"momentum": 3 * GIB}, [0], [1], 2 * GIB, 0.5 * GIB)
    with pytest.raises(DoesNotFit):
        greedy({"momentum": 3 * GIB}, [0], [], 2 * GIB)
