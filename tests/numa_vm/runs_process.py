"""Whole runs: one policy for all memory of the worker, the kernel's weighted interleave and the caller's own."""

from .whole import Runs, Seen

# All of them are made in base pages. The kernel takes the node of a huge page from its address, so a few of them need not lie as
# the policy's shares would have it: the heaps of glibc's threads begin at multiples of 64 MiB, which puts the first huge page of
# every heap on the same node, and an arena of this model has two huge pages, which cannot lie 1:2.
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


def check_over_time(row, seen: Seen) -> None:
    """Trace and monitor show all four nodes, and memory grows on them as the row says that it was added."""
    from pathlib import Path

    import pyarrow.parquet as pq
    import pytest

    from ldft.memory.probe import GIB, MIB

    shares = {entry["node"]: entry["share"] for entry in row["numa_shares"]}
    trace = pq.read_table(Path(seen.folder) / row["trace_path"]).to_pylist()
    assert all([entry["node"] for entry in sample["nodes"]] == [0, 1, 2, 3] for sample in trace)
    trace = [sample for sample in trace if sample["phase"] != "teardown"]  # a rank that ends may have nothing left
    by_trace = [
        {entry["node"]: entry["mib"] * MIB for entry in sample["memory"]} for sample in trace if sample["memory"]
    ]
    by_monitor = [
        {entry["node"]: entry["size"] for entry in rank["memory"]}
        for sample in seen.monitored
        for rank in sample["runs"][0]["ranks"]
        if rank["memory"] and sample["runs"][0]["phase"] != "teardown"
    ]
    for name, readings in (("trace", by_trace), ("monitor", by_monitor)):
        assert readings and all(set(found) == {0, 1, 2, 3} for found in readings), name
        added = {node: size - readings[0][node] for node, size in readings[-1].items()}
        total = sum(added.values())
        assert total > WORTH * 4096, (name, added)
        # Pages of files, which are counted here and not in the row, lie where they were read first.
        assert {node: size / total for node, size in added.items()} == pytest.approx(shares, abs=0.1), (name, added)
    roles = {(entry["role"], entry["node"]): entry["bytes"] for entry in trace[-1]["roles"]}
    asked = {(e["role"], e["node"]): e["bytes"] * e["share"] for e in row["roles"] if e["share"]}
    assert roles == pytest.approx(asked, abs=2)
    last = seen.monitored[-1]
    assert [node["node"] for node in last["nodes"]] == [0, 1, 2, 3]
    assert all(1 < node["total"] / GIB < 2.1 for node in last["nodes"])
    assert [line.split()[0] for line in seen.once.splitlines()[2:6]] == ["0", "1", "2", "3"]


@RUNS.add("weighted_0_3", "numa=weighted_0_3", base_pages=True, monitored=True)
def weighted_0_3(row, seen):
    """The kernel's weights, borrowed for the run."""
    import json

    assert row["numa_policy"] == "weighted_interleave of nodes 0,3 by 1:2"
    assert json.loads(row["numa_kernel_weights_json"])["3"] == 2
    check_shares(row, seen, {0: 1 / 3, 3: 2 / 3})
    check_over_time(row, seen)


@RUNS.add("callers_policy", before=("numactl", "--interleave=1,2"), base_pages=True)
def callers_policy(row, seen):
    """numa=default keeps what numactl gave, and says so."""
    assert row["numa_policy"] == "interleave of nodes 1-2"
    check_shares(row, seen, {1: 0.5, 2: 0.5})
