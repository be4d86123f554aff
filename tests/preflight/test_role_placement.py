"""Placements by role: what a role's keys mean, and what each rank is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest

from ldft.config import Config
from ldft.config.numa import NumaKind, NumaStrategy, RoleConfig, RolesConfig
from ldft.memory.policy import Placement, PlacementError
from ldft.memory.topology import Node, Topology
from ldft.preflight.resolved import resolve
from ldft.preflight.role_placement import stripes_of_process
from ldft.preflight.selection import select
from ldft.preflight.strategies import ROLES, STRATEGIES
from tests.conftest import compose, options

FOUR = Topology(
    nodes=tuple(Node(id=id, cpus=(), total_bytes=1 << 30, distances={id: 10}) for id in range(4)),
    gpus={},
    weights={},
    weights_auto=None,
    allowed=(0, 1, 2, 3),
)


def assign(config: Config, topology: Topology) -> list[Mapping[str, Placement]]:
    return [*resolve(config, topology=topology).placements]


def bind(node: int) -> Placement:
    return Placement(kind="bind", nodes=(node,))


def test_every_role_has_its_keys() -> None:
    assert tuple(f.name for f in fields(RolesConfig)) == ROLES


@pytest.mark.parametrize(
    ("given", "placement"),
    [
        ({}, None),
        ({"nodes": [3]}, bind(3)),
        ({"nodes": [0, 3]}, Placement(kind="interleave", nodes=(0, 3))),
        ({"nodes": [0, 3], "weights": [4, 1]}, Placement(kind="weighted_interleave", nodes=(0, 3), weights=(4, 1))),
        ({"nodes": [0, 3], "kind": NumaKind.preferred}, Placement(kind="preferred", nodes=(0, 3))),
        ({"kind": NumaKind.interleave}, Placement(kind="interleave")),
    ],
)
def test_the_kind_follows_from_what_is_given(given: dict[str, Any], placement: Placement | None) -> None:
    assert RoleConfig(**given).placement == placement


def test_the_seeds_table_goes_to_every_rank_and_the_command_line_wins() -> None:
    config = compose("numa=roles_0_3", "numa.roles.momentum.nodes=[0,3]", "numa.roles.momentum.weights=[4,1]",
                     "numa.roles.compute_weights.nodes=[2]", "launch.num_ranks=2", "launch.device=cpu")  # fmt: skip
    config.validate()
    ranks = assign(config, FOUR)
    assert (
        ranks[0]
        == ranks[1]
        == {
            "master_weights": bind(0),
            "master_gradients": bind(0),
            "momentum": Placement(kind="weighted_interleave", nodes=(0, 3), weights=(4, 1)),
            "variance": Placement(),
            "compute_weights": bind(2),
            "compute_gradients": bind(3),
            "activations": bind(3),
        }
    )


def test_a_role_by_hand_works_on_top_of_a_policy_of_the_process() -> None:
    config = compose("numa=interleave_0_3", "numa.roles.variance.nodes=[1]", "launch.device=cpu")
    config.validate()
    assert config.numa.by_role and config.numa.placement.kind == "interleave"
    assert {role: p for role, p in assign(config, FOUR)[0].items() if p.kind != "default"} == {"variance": bind(1)}


def test_nodes_are_filled_in_and_checked_against_the_machine() -> None:
    config = compose("numa.roles.variance.kind=interleave", "launch.device=cpu")
    assert assign(config, FOUR)[0]["variance"].nodes == (0, 1, 2, 3)
    config = compose("numa.roles.variance.nodes=[7]", "launch.device=cpu")
    with pytest.raises(PlacementError, match=r"^numa\.roles\.variance\.nodes: node 7 does not exist"):
        assign(config, FOUR)


def test_stripes_stand_in_for_weights_where_the_kernel_has_none_and_there_is_something_to_stripe() -> None:
    def rest(*overrides: str) -> Placement | None:
        return stripes_of_process(select(compose("launch.device=cpu", *overrides), topology=FOUR))

    striped = Placement(kind="weighted_interleave", nodes=(0, 3), weights=(1, 2), method="stripes")
    assert rest("numa=weighted_0_3") == striped
    config = compose("launch.device=cpu", "numa=weighted_0_3", "numa.roles.momentum.nodes=[1]")
    assert assign(config, FOUR)[0] == dict.fromkeys(ROLES, striped) | {"momentum": bind(1)}
    assert rest("numa=interleave_0_3") is None
    assert rest("numa=weighted_0_3", "memory.pinning=torch") is None
    assert rest("numa=weighted_0_3", "offload=none", "checkpointing=gpu") is None
    able = replace(FOUR, weights={0: 2, 1: 1, 2: 1, 3: 4})
    assert stripes_of_process(select(compose("launch.device=cpu", "numa=weighted_0_3"), topology=able)) is None


def test_every_strategy_has_its_entry_and_its_option() -> None:
    names = {strategy.name for strategy in NumaStrategy} - {"none"}
    assert names == STRATEGIES.keys() and names <= set(options("numa"))
