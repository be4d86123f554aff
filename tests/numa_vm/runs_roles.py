"""Whole runs with each role placed alone. The row has the requested shares, and the watcher finds DeepSpeed's own tensors there."""

import json
import sys
from pathlib import Path

from .whole import Runs, Seen

RUNS = Runs()
PARAMETERS = 1_122_624
# Bytes a parameter with full offload and AdamW. The emulated CPU has no bf16 of its own where QEMU cannot emulate AVX-512, so
# `train.precision=auto` computes in fp32 there.
BYTES = dict.fromkeys(("master_weights", "momentum", "variance"), 4)
COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
PAGE = 4096
# Where a role ends within a page, and the stripe that the last page belongs to.
STRAY_PAGES = 2


def check_roles(row, seen: Seen, wanted: dict[str, dict[int, float]]) -> None:
    """Asked, reported and seen from outside agree, to a page or two; and the bytes are exact."""
    width = COMPUTE_BYTES[row["cfg.train.precision"]]
    sizes = BYTES | {"compute_weights": width, "compute_gradients": width}
    by_role: dict[str, dict[int, dict]] = {}
    for entry in row["roles"]:
        by_role.setdefault(entry["role"], {})[entry["node"]] = entry
    for role, shares in wanted.items():
        entries = by_role[role]
        size = sizes[role] * PARAMETERS if role in sizes else next(iter(entries.values()))["bytes"]
        pages = -(-size // PAGE)
        assert {entry["bytes"] for entry in entries.values()} == {size}, entries
        asked = {node: entry["requested_share"] for node, entry in entries.items() if entry["requested_share"]}
        assert set(asked) == set(shares), (role, asked)
        for node, share in shares.items():
            assert abs(asked[node] - share) * pages < 1, (role, asked)
            assert abs(entries[node]["share"] - share) * pages <= STRAY_PAGES, (role, entries)
            assert abs(seen.roles[role].get(node, 0) - share * pages) <= STRAY_PAGES, (role, seen.roles, seen.mapped)
        assert set(seen.roles[role]) == set(shares), (role, seen.roles)


@RUNS.add(
    "roles_0_3",
    "numa=roles_0_3",
    "checkpointing=cpu",
    "numa.roles.momentum.nodes=[0,3]",
    "numa.roles.momentum.weights=[4,1]",
    # For all that has no role of its own; above what the kernel's weights can say.
    "numa.kind=weighted_interleave",
    "numa.nodes=[0,3]",
    "numa.weights=[300,600]",
)
def roles_0_3(row, seen):
    """The seed's table, with moments by weights of their own: 4:1, and 1:2 by stripes in place of the kernel's weights."""
    assert row["numa_mechanism"] == "stripes"
    shares = {
        "master_weights": {0: 1.0},
        "momentum": {0: 0.8, 3: 0.2},
        "variance": {0: 1 / 3, 3: 2 / 3},
        "compute_weights": {3: 1.0},
        "compute_gradients": {3: 1.0},
        "activations": {3: 1.0},
    }
    check_roles(row, seen, shares)


# 3.5 of the four roles of 4 bytes a parameter (in fp32, gradients too): the last one, by the paper's order, is cut in half.
@RUNS.add(
    "cxl_aware_cut",
    "numa=cxl_aware",
    "train.precision=fp32",
    "numa.local_nodes=[0]",
    "numa.cxl_nodes=[3]",
    f"numa.local_budget_gib={3.5 * 4 * PARAMETERS / 2**30}",
)
def cxl_aware_cut(row, seen):
    """The local budget ends within the master weights."""
    shares = {role: {0: 1.0} for role in ("momentum", "variance", "compute_gradients")}
    shares |= {"master_weights": {0: 0.5, 3: 0.5}, "compute_weights": {3: 1.0}}
    check_roles(row, seen, shares)


@RUNS.add("plan", "plan=fastest", "offload=full", before=(sys.executable, str(Path(__file__).with_name("measured.py"))))
def plan(row, seen):
    """A plan places the roles by the cost model, and they are where it said."""
    asked = json.loads(row["cfg.asked"])
    assert (asked["plan.goal"], asked["numa.name"], row["cfg.numa.name"]) == ("fastest", "default", "optimal")
    wanted: dict[str, dict[int, float]] = {}
    for entry in row["roles"]:
        if entry["requested_share"]:
            wanted.setdefault(entry["role"], {})[entry["node"]] = entry["requested_share"]
    assert {"master_weights", "momentum", "variance", "compute_weights", "compute_gradients"} <= set(wanted)
    bytes_of = {entry["role"]: entry["bytes"] for entry in row["roles"]}
    by_node = {node: sum(bytes_of[role] * of.get(node, 0.0) for role, of in wanted.items()) for node in range(4)}
    # Sockets are three times as fast as expanders; all four take part.
    assert min(by_node.values()) > 0 and by_node[0] + by_node[1] > 2 * (by_node[2] + by_node[3]), by_node
    check_roles(row, seen, wanted)
