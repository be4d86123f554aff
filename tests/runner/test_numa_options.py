"""numa= in whole runs: applied by each rank before anything else, recorded as asked and as achieved."""

from __future__ import annotations

import json

import pytest

from ldft import _native
from ldft.config import Config
from ldft.config.numa import NumaConfig, NumaKind
from ldft.memory.policy import MPOL_DEFAULT, MPOL_INTERLEAVE, PlacementError
from ldft.memory.probe import GIB, MIB
from ldft.memory.topology import read_topology
from ldft.preflight.selection import select
from ldft.runner import node_memory

NODE = read_topology().memory_nodes[0]


def test_default_inherits_and_records_what_the_caller_set(ldft) -> None:
    _native.set_thread_policy(MPOL_INTERLEAVE, [NODE])  # as `numactl --interleave` does before it starts a program
    try:
        done = ldft()
    finally:
        _native.set_thread_policy(MPOL_DEFAULT, [])
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row.numa_policy == f"interleave of node {NODE}"
    assert [(s["node"], s["requested_share"]) for s in row.numa_shares if s["share"]] == [(NODE, 1.0)]


def test_a_policy_is_applied_and_its_shares_are_in_the_row_and_on_screen(ldft) -> None:
    done = ldft("numa=bind_0", f"numa.nodes=[{NODE}]")
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row.numa_policy == f"bind of node {NODE}" and row["cfg.numa.kind"] == "bind"
    share = next(s for s in row.numa_shares if s["node"] == NODE)
    assert share["requested_share"] == 1.0 and share["share"] > 0.95
    assert share["added_gib"] > 0.05  # torch and the model, not the interpreter alone
    assert row.numa_passed_over == 0 or len(read_topology().nodes) > 1
    assert row.khugepaged_gib >= 0
    assert sum(n["total_gib"] for n in row.nodes) == pytest.approx(row.peak_rss_gib[0], rel=0.2)
    assert "Per-node process memory usage (in MBs) for PID" in done.stdout
    assert f"ldft: memory policy bind of node {NODE}: asked node {NODE} 100.0%; got node {NODE}" in done.stdout


def test_weights_that_the_kernel_cannot_have_stripe_the_arenas_instead(ldft, here) -> None:
    done = ldft("numa=weighted_0_3", f"numa.nodes=[{NODE}]", "numa.weights=[300]")
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row.numa_mechanism == "stripes" and row.numa_policy == f"weighted_interleave of nodes {NODE} by 300"
    assert {entry["requested_share"] for entry in row.roles} == {1.0} == {entry["share"] for entry in row.roles}
    assert "offloaded tensors are striped by them instead" in done.stdout
    # Without arenas there is nothing to stripe.
    done = here("model=nano", "numa=weighted_0_3", f"numa.nodes=[{NODE}]", "numa.weights=[300]", "memory.pinning=torch")
    assert done.exit_code == 2 and "numa.weights: 300 is above the kernel's largest weight, 255" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("numa=weighted_0_3", "numa.nodes=[0,99]"), "numa.nodes: node 99 does not exist on this machine (online:"),
        (("numa=interleave_0_3", "numa.nodes=[0,0]"), "numa.nodes: [0, 0] lists a node twice"),
        (("numa=weighted_0_3", "numa.weights=[1]"), "numa.weights: 1 weight for 2 nodes"),
        (("numa=default", "numa.nodes=[0]"), "numa.nodes: kind default takes no nodes"),
    ],
)
def test_nodes_that_do_not_exist_are_one_line_and_exit_code_2(here, arguments, key) -> None:
    done = here("model=nano", *arguments)
    assert done.exit_code == 2 and done.row.status == "invalid"
    if "99" in key or len(read_topology().nodes) > 3:
        assert done.row.error_message.startswith(key)
    assert done.row.error_message in done.stderr and "\n" not in done.row.error_message


def report(added: dict[str, int], requested: dict[str, float] | None, passed: int = 0, merged: int = 0) -> dict:
    return {
        "numa_counters": {"passed_over": {"0": 70, "3": 5}, "merged_bytes": 4 * GIB},
        "numa_counters_end": {"passed_over": {"0": 70 + passed, "3": 5}, "merged_bytes": 4 * GIB + merged},
        "numa_policy": "weighted_interleave of nodes 0,3 by 1:2",
        "numa_requested": requested,
        "numa_kernel_weights_json": json.dumps({0: 1, 3: 2}),
        "numa_added": added,
        "numa_memory": {node: [0, MIB, 0, size, 0] for node, size in added.items()},
        "numa_process": [[7], ["python"]],
    }


def test_ranks_are_summed_and_a_difference_is_a_warning() -> None:
    asked = {"0": 1 / 3, "3": 2 / 3}
    ranks = [report({"0": GIB, "3": 3 * GIB}, asked), report({"0": GIB, "3": GIB}, asked)]
    row = node_memory.columns(ranks, "here")
    assert [(s["node"], s["added_gib"], s["share"]) for s in row["numa_shares"]] == [
        (0, 2.0, pytest.approx(1 / 3)),
        (3, 4.0, pytest.approx(2 / 3)),
    ]
    assert row["nodes"][1]["total_gib"] == pytest.approx(4 + 2 / 1024)
    said = node_memory.lines(row, ranks)
    assert said[-1].endswith("asked node 0 33.3%, node 3 66.7%; got node 0 33.3%, node 3 66.7%")
    astray = [report({"0": 2 * GIB, "3": 2 * GIB}, asked)]
    assert "warning" in node_memory.lines(node_memory.columns(astray, "here"), astray)[-1]
    astray = [report({"0": 2 * GIB, "3": 2 * GIB}, asked, passed=9, merged=GIB)]
    row = node_memory.columns(astray, "here")
    assert row["numa_passed_over"] == 9 and row["khugepaged_gib"] == 1.0
    full, merged = node_memory.lines(row, astray)[-2:]
    assert "passed over node 0 9 times" in full and "node 3" not in full and "khugepaged merged 1.00 GiB" in merged
    open_ended = [report({"0": GIB}, None)]
    assert "warning" not in node_memory.lines(node_memory.columns(open_ended, "here"), open_ended)[-1]


def test_the_policy_is_set_before_numpy_and_torch_are_imported(monkeypatch) -> None:
    """Asked of a fresh worker module: what it has imported when it sets the policy."""
    import subprocess
    import sys

    code = (
        "import sys, ldft.runner.worker\nfrom ldft.runner import node_memory\nfrom ldft.config import Config\n"
        "from ldft.preflight.selection import select\n"
        "node_memory.begin(select(Config()))\nprint([m for m in ('torch', 'numpy', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_begin_refuses_what_the_machine_does_not_have() -> None:
    config = Config(numa=NumaConfig(kind=NumaKind.bind, nodes=[63]))
    with pytest.raises(PlacementError, match="node 63 does not exist"):
        node_memory.begin(select(config))
