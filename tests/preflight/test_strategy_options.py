"""numa.strategy: which nodes each option uses, within which budgets, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from ldft.bench import profile as profiles
from ldft.config import Config
from ldft.errors import ConfigError
from ldft.memory import bandwidths, cost_model
from ldft.memory.policy import Placement, PlacementError
from ldft.memory.topology import Node, Topology
from ldft.preflight import fit, host_estimate, placement_text
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from ldft.preflight.strategies import ROLES, streams
from tests.conftest import compose

GIB = 2**30


def machine(*, local: int = 1, cxl: int = 1, gib: int = 256) -> Topology:
    """Nodes with CPUs first, then nodes without."""
    count = local + cxl
    nodes = tuple(
        Node(id=id, cpus=(id,) * (id < local), total_bytes=gib * GIB, distances=dict.fromkeys(range(count), 10))
        for id in range(count)
    )
    return Topology(nodes=nodes, gpus={}, weights={}, weights_auto=None, allowed=tuple(range(count)))


def config(strategy: str, *more: str) -> Config:
    made = compose("model=llama3_8b", "launch.device=cuda", f"numa={strategy}", *more)
    made.validate()
    return made


def assign(config: Config, topology: Topology) -> list[Mapping[str, Placement]]:
    return [*resolve(config, topology=topology).placements]


def on_nodes(made: Config, topology: Topology) -> dict[int, float]:
    """Bytes of all ranks by node."""
    held: dict[int, float] = {}
    sizes = host_estimate.host_bytes(select(made))
    for placements in assign(made, topology):
        for role, size in sizes.items():
            for node, share in (placements[role].shares() or {}).items():
                held[node] = held.get(node, 0.0) + size * share
    return held


BANDWIDTH = "numa.bandwidth={node0:{cpu:278,h2d:55,d2h:55},node1:{cpu:69,h2d:53,d2h:37}}"


def test_local_only_is_every_role_on_the_nodes_with_cpus() -> None:
    both = Placement(kind="interleave", nodes=(0, 1))
    assert assign(config("local_only"), machine(local=2, cxl=2)) == [dict.fromkeys(ROLES, both)]
    # One node is enough for it.
    alone = Placement(kind="bind", nodes=(0,))
    assert assign(config("local_only"), machine(cxl=0)) == [dict.fromkeys(ROLES, alone)]


def test_naive_interleaving_is_every_role_over_all_nodes_evenly() -> None:
    every = Placement(kind="interleave", nodes=(0, 1, 2))
    assert assign(config("naive_interleaving"), machine(cxl=2)) == [dict.fromkeys(ROLES, every)]
    sockets = Placement(kind="interleave", nodes=(0, 1))
    assert assign(config("naive_interleaving"), machine(local=2, cxl=0)) == [dict.fromkeys(ROLES, sockets)]


@pytest.mark.parametrize("ranks", [1, 4])
def test_cxl_aware_fills_the_local_budget_that_all_ranks_share(ranks: int) -> None:
    made = config("cxl_aware", "numa.local_budget_gib=100", "numa.cxl_budget_gib=256", f"launch.num_ranks={ranks}")
    placements = assign(made, machine(gib=300))
    assert len(placements) == ranks and all(of == placements[0] for of in placements)
    shown = placements[0]
    assert [shown[role].nodes for role in ("momentum", "variance", "compute_gradients")] == [(0,)] * 3
    assert shown["master_weights"].nodes == (0, 1) and shown["master_weights"].method == "stripes"
    assert [shown[role].nodes for role in ("compute_weights", "activations")] == [(1,)] * 2
    held = on_nodes(made, machine(gib=300))
    assert 0.999 * 100 * GIB < held[0] <= 100 * GIB


def test_budgets_by_default_are_what_the_nodes_have_less_the_processes() -> None:
    made = config("cxl_aware")
    held = on_nodes(made, machine(gib=80))
    process = resolve(made, topology=machine(gib=80)).estimate.others["process"]
    assert held[0] == pytest.approx(80 * GIB * 31 / 32 - process, rel=1e-5)


def test_a_role_by_hand_wins_and_takes_its_part_of_the_budget() -> None:
    made = config("cxl_aware", "numa.local_budget_gib=100", "numa.roles.compute_weights.nodes=[0]")
    placements = assign(made, machine(gib=300))[0]
    assert placements["compute_weights"] == Placement(kind="bind", nodes=(0,))
    assert 0.999 * 100 * GIB < on_nodes(made, machine(gib=300))[0] <= 100 * GIB


def test_striped_gives_each_rank_a_cxl_node_in_turn() -> None:
    line = ("striped", "launch.num_ranks=3", "numa.local_budget_gib=100")
    in_turn = [Placement(kind="bind", nodes=(node,)) for node in (1, 2, 1)]
    # DeepSpeed's update reads fp32 gradients, and the 16-bit ones are only copied.
    placements = assign(config(*line, "optimizer.fused_step=false"), machine(cxl=2))
    for role in ("activations", "compute_gradients"):
        assert [of[role] for of in placements] == in_turn
    placements = assign(config(*line), machine(cxl=2))
    assert [of["activations"] for of in placements] == in_turn
    assert [of["compute_gradients"] for of in placements] == [Placement(kind="bind", nodes=(0,))] * 3
    assert placements[0]["momentum"] == placements[2]["momentum"] == Placement(kind="bind", nodes=(0,))
    assert placements[0]["compute_weights"] == Placement(kind="interleave", nodes=(1, 2))


@pytest.mark.parametrize("ranks", [1, 2])
def test_optimal_uses_both_nodes_keeps_the_budgets_and_is_no_slower_than_cxl_aware(ranks: int) -> None:
    budgets = ("numa.local_budget_gib=120", "numa.cxl_budget_gib=80", f"launch.num_ranks={ranks}")
    made, paper = (config(name, *budgets, BANDWIDTH) for name in ("optimal", "cxl_aware"))
    held = on_nodes(made, machine(gib=300))
    assert held[0] <= 120 * GIB and 10 * GIB < held[1] <= 80 * GIB
    ours, theirs = (
        sum(placement_text.modelled_s(resolve(of, topology=machine(gib=300))).values()) for of in (made, paper)
    )
    assert 0 < ours < theirs


def test_optimal_finds_the_machines_profile_and_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^numa\.bandwidth: .*python -m ldft.bench nodes, or give numa.bandwidth$"):
        assign(config("optimal"), machine())
    profile = {"bandwidth": {"node0": {"cpu": 278}, "node1": {"cpu": 69}}}
    profiles.save(profile, bandwidths.profile_path())
    assert assign(config("optimal"), machine())[0]["momentum"].nodes
    profiles.save({"bandwidth": {"node0": {"cpu": 278}}}, bandwidths.profile_path())
    with pytest.raises(ConfigError, match=r"^numa\.bandwidth: node 1 is missing \(nodes: 0\)"):
        assign(config("optimal"), machine())
    bandwidths.profile_path().write_text(json.dumps(profile)[:20])
    with pytest.raises(ConfigError, match=r"cannot be read; measure again"):
        assign(config("optimal"), machine())
    assert assign(config("optimal", BANDWIDTH), machine())[0]["momentum"].nodes  # by hand wins


@pytest.mark.parametrize("text", ["junk", "", "[]", '{"bandwidth": []}', '{"bandwidth": {"node0": {}}}'])
def test_a_damaged_profile_stops_optimal_alone(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profiles.save({}, bandwidths.profile_path())
    bandwidths.profile_path().write_text(text)
    for strategy in ("local_only", "cxl_aware"):
        assert "modelled_traffic_s" not in fit.predictions(resolve(config(strategy), topology=machine()))
        assert placement_text.modelled_s(resolve(config(strategy), topology=machine())) == {}
    said = capsys.readouterr().err
    assert said.startswith("ldft: numa.bandwidth: ") and said.endswith("; modelled times are left out\n")
    assert said.count("\n") == 1
    with pytest.raises(ConfigError, match=r"^numa\.bandwidth: "):
        assign(config("optimal"), machine())
    assert placement_text.modelled_s(resolve(config("local_only", BANDWIDTH), topology=machine()))


def test_the_plan_counts_the_passes_that_are_made() -> None:
    assert streams(select(config("optimal"))) == cost_model.overlapped(cost_model.FUSED)
    assert streams(select(config("optimal", "optimizer.overlap_step=false"))) == cost_model.FUSED
    for more in ("optimizer.fused_step=false", "offload=optimizer"):
        assert streams(select(config("optimal", more))) == cost_model.STOCK
    # Each micro-batch fetches weights and adds to gradients; the fp32 gradients are written once, and there is one update.
    four = streams(select(config("optimal", "train.gradient_accumulation_steps=4", "optimizer.fused_step=false")))
    assert four["optimizer", "cpu"] == cost_model.STOCK["optimizer", "cpu"]
    assert four["forward", "h2d"] == {"compute_weights": 4} and four["forward", "d2h"] == {"activations": 4}
    assert four["backward", "h2d"] == {"compute_weights": 4, "activations": 4, "compute_gradients": 4}
    assert four["backward", "d2h"] == {"compute_gradients": 4, "master_gradients": 1}


@pytest.mark.parametrize("strategy", ["naive_interleaving", "cxl_aware", "striped", "optimal"])
def test_one_node_is_refused_in_one_line(strategy: str) -> None:
    with pytest.raises(PlacementError) as caught:
        assign(config(strategy), machine(cxl=0))
    line = str(caught.value)
    assert line.startswith("numa.cxl_nodes: no node without CPUs here (nodes with memory: 0)") and "\n" not in line
    assert 'needs; use numa=local_only, or see README, "Trying it without NUMA hardware"' in line


def test_two_sockets_can_stand_in_for_cxl() -> None:
    with pytest.raises(PlacementError, match=r"needs; name nodes of another socket, or see README"):
        assign(config("cxl_aware"), machine(local=2, cxl=0))


@pytest.mark.parametrize("strategy", ["cxl_aware", "striped", "optimal"])
def test_what_the_budgets_do_not_hold_is_refused(strategy: str) -> None:
    made = config(strategy, "numa.local_budget_gib=30", "numa.cxl_budget_gib=40", BANDWIDTH)
    with pytest.raises(PlacementError, match=r"^numa\.strategy: \w+: the roles need 1\d\d\.\d GiB, the budgets give"):
        assign(made, machine())


def test_the_plan_is_shown_with_its_modelled_time() -> None:
    made = config(
        "striped", BANDWIDTH.replace("}}", "},node2:{cpu:69}}"), "numa.local_budget_gib=100", "launch.num_ranks=2"
    )
    text = "\n".join(placement_text.lines(resolve(made, topology=machine(cxl=2))))
    assert "momentum: node 0 100.0% (14.96 GiB)" in text
    assert "activations: node 1 100.0% (248.00 MiB)\n    rank 1: node 2 100.0% (248.00 MiB)" in text
    assert "modelled traffic to host memory, s per step: " in text and "forward" in text and "optimizer" not in text
    assert placement_text.lines(resolve(compose("numa=bind_0", "launch.device=cpu"), topology=machine())) == [
        "memory policy of the ranks (numa=bind_0): bind of node 0"
    ]
    (line,) = placement_text.lines(resolve(compose("launch.device=cpu"), topology=machine()))
    assert line.startswith("memory policy of the ranks (numa=default): ")


def test_a_role_placed_by_hand_takes_nothing_of_the_budget_for_the_others() -> None:
    by_hand = config("cxl_aware", "numa.local_budget_gib=35", "numa.roles.momentum.nodes=[1]")
    placements = assign(by_hand, machine())[0]
    assert placements["momentum"] == Placement(kind="bind", nodes=(1,))
    assert placements["variance"] == Placement(kind="bind", nodes=(0,))  # 30 of 35 GiB: fits alone, not beside momentum


@pytest.mark.parametrize("strategy", ["striped", "cxl_aware"])
def test_a_role_without_bytes_is_not_placed(strategy: str) -> None:
    made = config(strategy, "checkpointing.layers=0", "numa.local_budget_gib=100")
    assert "activations" not in host_estimate.host_bytes(select(made))
    assert assign(made, machine())[0].get("activations", Placement()) == Placement()
