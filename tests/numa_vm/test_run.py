"""`python -m ldft` as a whole in the emulated machine: two runs, their rows against what a watcher saw."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from ldft import results
from numa_vm import machine
from numa_vm.conftest import ROOT, RUN_LIMIT_S, boot

SMALL = ["model=nano", "seq_len.tokens=16", "train.iterations=3", "train.warmup_iterations=1"]
RUNS = {
    # name: what stands before `python -m ldft`, overrides, policy in the row, wanted shares
    "weighted_0_3": ([], ["numa=weighted_0_3"], "weighted_interleave of nodes 0,3 by 1:2", {0: 1 / 3, 3: 2 / 3}),
    "callers_policy": (["numactl", "--interleave=1,2"], ["numa=default"], "interleave of nodes 1-2", {1: 0.5, 2: 0.5}),
}
WITHIN = 0.05
# Room for the page cache of Python's libraries too: an interleave passes over a node that is full of it.
NODES = "cpu:3072 cpu:1536 mem:1024 mem:2048"


def command(folder: Path, name: str, variables: dict[str, str]) -> str:
    before, overrides, _, _ = RUNS[name]
    variables = {**variables, "PYTHONPATH": f"{variables['PYTHONPATH']}:{ROOT / 'tests'}"}
    ldft = [*before, sys.executable, "-m", "ldft", *SMALL, *overrides, f"results.dir={folder / name}"]
    watch = [sys.executable, "-m", "numa_vm.watch", str(folder / f"{name}.json"), *ldft]
    return shlex.join(["env", *(f"{key}={value}" for key, value in variables.items()), *watch])


@pytest.fixture(scope="session")
def monkeypatch_session():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def runs(numa_vm, portable_ops, request, monkeypatch_session) -> Path:
    """The folder with the results of the runs that were selected, of this session alone."""
    wanted = [
        item.callspec.params["name"] for item in request.session.items if "runs" in getattr(item, "fixturenames", ())
    ]
    monkeypatch_session.setenv("LDFT_NUMA_VM_NODES", NODES)
    folder = numa_vm / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in wanted:
        # Software emulation of several CPUs has been seen to stand still, once, on an overloaded host: a second boot is allowed,
        # where the first came to no end at all. A run that ends is judged as it is.
        for _ in range(2):
            try:
                boot(numa_vm, ["sh", "-c", command(folder, name, portable_ops)], RUN_LIMIT_S)
                break
            except (machine.MachineError, TimeoutError) as error:
                (folder / "error").write_text(f"numa-vm: {error}")
                shutil.rmtree(folder / name, ignore_errors=True)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_run_is_ok_and_its_memory_is_where_the_policy_says(runs, name):
    watched_path = runs / f"{name}.json"
    failed = runs / "error"
    assert watched_path.exists(), failed.read_text() if failed.exists() else "the run left nothing"
    watched = json.loads(watched_path.read_text())
    rows = results.read(runs / name)
    assert len(rows) == 1
    row = rows.iloc[0]
    assert row["status"] == "ok", f"{row['error_type']}: {row['error_message']}"
    _, _, policy, wanted = RUNS[name]
    assert row["numa_policy"] == policy

    # What the watcher saw the worker add since its first breath, when the interpreter itself was there already.
    first, last = ({int(node): pages for node, pages in watched[when].items()} for when in ("first", "last"))
    added = {node: max(0, pages - first.get(node, 0)) for node, pages in last.items()}
    total = sum(added.get(node, 0) for node in wanted)
    assert total > 20_000, f"the watcher saw less than 80 MB: {first}, {last}"
    for node, share in wanted.items():
        assert added.get(node, 0) / total == pytest.approx(share, rel=WITHIN), f"the watcher: {first}, {last}"
    # The interpreter itself, before it could set a policy: 13 MB.
    assert sum(added.values()) - total < 6000, f"the watcher: {first}, {last}"
    achieved = {entry["node"]: entry["share"] for entry in row["numa_shares"]}
    for node, share in wanted.items():
        assert achieved[node] == pytest.approx(share, rel=WITHIN), f"the row: {achieved}"
    assert sum(share for node, share in achieved.items() if node not in wanted) < WITHIN

    asked = {entry["node"]: entry["requested_share"] for entry in row["numa_shares"] if entry["requested_share"]}
    assert asked == pytest.approx(wanted)
    if name == "weighted_0_3":
        assert json.loads(row["numa_kernel_weights_json"])["3"] == 2
