"""Whole runs: one policy for all memory of the worker, the kernel's weighted interleave and the caller's own."""

from numa_vm.whole import Runs, Seen

RUNS = Runs()
WITHIN = 0.05
# Enough for the shares to mean something: 80 MB.
WORTH = 20_000
# Pages that may be elsewhere: the interpreter moves some that it had before it could set a policy. 4 MB.
STRAY = 1000


def check_shares(row, seen: Seen, wanted: dict[int, float]) -> None:
    """What the worker added is where the policy wanted it, by the watcher and by the row."""
    import pytest

    added = seen.added()
    total = sum(added.get(node, 0) for node in wanted)
    assert total > WORTH, f"the watcher: {seen}"
    for node, share in wanted.items():
        assert added.get(node, 0) / total == pytest.approx(share, rel=WITHIN), f"the watcher: {seen}"
    assert sum(added.values()) - total < STRAY, f"the watcher: {seen}"

    achieved = {entry["node"]: entry["share"] for entry in row["numa_shares"]}
    for node, share in wanted.items():
        assert achieved[node] == pytest.approx(share, rel=WITHIN), f"the row: {achieved}"
    assert sum(share for node, share in achieved.items() if node not in wanted) < WITHIN, f"the row: {achieved}"
    asked = {entry["node"]: entry["requested_share"] for entry in row["numa_shares"] if entry["requested_share"]}
    assert asked == pytest.approx(wanted)


@RUNS.add("weighted_0_3", "numa=weighted_0_3")
def weighted_0_3(row, seen):
    """The kernel's weights, borrowed for the run."""
    import json

    assert row["numa_policy"] == "weighted_interleave of nodes 0,3 by 1:2"
    assert json.loads(row["numa_kernel_weights_json"])["3"] == 2
    check_shares(row, seen, {0: 1 / 3, 3: 2 / 3})


@RUNS.add("callers_policy", before=("numactl", "--interleave=1,2"))
def callers_policy(row, seen):
    """numa=default keeps what numactl gave, and says so."""
    assert row["numa_policy"] == "interleave of nodes 1-2"
    check_shares(row, seen, {1: 0.5, 2: 0.5})
