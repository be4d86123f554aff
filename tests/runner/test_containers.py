"""Runs in a container that forbids NUMA calls, as Docker's default profile does: a real seccomp filter, on two recorded nodes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldft.memory.topology import format_list, read_topology
from tests.conftest import Done, long
from tests.memory.conftest import meminfo, write

REFUSING = Path(__file__).with_name("refusing.py")
NODE = read_topology().memory_nodes[0]
OTHER = NODE + 1
UNCONFINED = "--security-opt seccomp=unconfined"


@pytest.fixture
def two_nodes(tmp_path: Path) -> dict[str, str]:
    """An environment whose Pythons see a second node of memory, a recorded one, beside the one that this machine has."""
    cpus = format_list(tuple(range(os.cpu_count() or 1)))
    folder = "devices/system/node"
    files = {f"{folder}/online": f"{NODE},{OTHER}"}
    for node, distance in ((NODE, "10 20"), (OTHER, "20 10")):
        files[f"{folder}/node{node}/cpulist"] = cpus if node == NODE else ""
        files[f"{folder}/node{node}/distance"] = distance
        files[f"{folder}/node{node}/meminfo"] = meminfo(node, 32 << 20, 16 << 20)
    write(tmp_path / "sys", files)
    code = f"topology.read_topology.__defaults__ = (Path({str(tmp_path / 'sys')!r}), Path('/none'))"
    write(tmp_path, {"site/sitecustomize.py": f"from pathlib import Path\nfrom ldft.memory import topology\n{code}"})
    repository = REFUSING.parents[2]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (f"{tmp_path}/site", str(repository), os.environ.get("PYTHONPATH"))))
    }


@pytest.fixture
def contained(
    tmp_path: Path, command: Callable[..., list[str]], two_nodes: dict[str, str]
) -> Callable[[tuple[str, ...], tuple[str, ...]], Done]:
    """Run a small `python -m ldft` on two nodes where these calls are answered by EPERM."""

    def run(calls: tuple[str, ...], overrides: tuple[str, ...]) -> Done:
        done = subprocess.run(
            [sys.executable, str(REFUSING), "EPERM", *calls, "--", *command(*overrides)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env=os.environ | two_nodes,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr, tmp_path / "results")

    return run


DOCKER = ("move_pages", "mbind", "set_mempolicy", "get_mempolicy")


@pytest.mark.parametrize("pinning", ["none", pytest.param("torch", marks=long)])
def test_what_was_left_open_runs_and_says_that_it_is_not_verified(contained, pinning: str) -> None:
    done = contained(DOCKER, (f"memory.pinning={pinning}",))
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert row.status == "ok" and len(row.roles) > 3
    assert {(entry["node"], entry["share"], entry["requested_share"]) for entry in row.roles} == {(None, None, None)}
    assert all(entry["bytes"] > 0 for entry in row.roles)
    (note,) = (note for note in row.notes if "not verified" in note)
    assert UNCONFINED in note and note in done.stdout
    # What /proc/PID/numa_maps says needs no such call.
    resident_gib = sum(node["total_gib"] for node in row.nodes)
    assert sum(entry["bytes"] for entry in row.roles) / 2**30 < resident_gib < row.peak_rss_gib[0] * 1.05
    assert math.isclose(sum(share["share"] for share in row.numa_shares if share["share"]), 1.0)


@long
def test_a_policy_of_the_process_works_with_the_capability_alone(contained) -> None:
    """--cap-add SYS_NICE allows the policy calls, and not move_pages."""
    done = contained(("move_pages",), ("numa=bind_0", f"numa.nodes=[{NODE}]"))
    assert done.exit_code == 0, done.stdout + done.stderr
    row = done.row
    assert {(entry["node"], entry["share"], entry["requested_share"]) for entry in row.roles} == {(NODE, None, 1.0)}
    (share,) = (share for share in row.numa_shares if share["share"])
    assert (share["node"], share["requested_share"]) == (NODE, 1.0)
    assert f"{NODE}: 100.0% -> not verified" in done.stdout


@pytest.mark.parametrize(
    ("calls", "overrides", "said"),
    [
        pytest.param(("move_pages",), ("numa.scope=roles", f"numa.roles.momentum.nodes=[{NODE}]"),
         f"numa: verifying bind of node {NODE} needs move_pages, which is forbidden here", marks=long),
        pytest.param(DOCKER, ("numa.scope=roles", f"numa.roles.momentum.nodes=[{NODE}]"),
         f"numa: bind of node {NODE} needs mbind, which is forbidden here", marks=long),
        (DOCKER, ("numa=bind_0", f"numa.nodes=[{NODE}]"),
         f"numa: bind of node {NODE} needs set_mempolicy, which is forbidden here"),
    ],
)  # fmt: skip
def test_a_placement_is_refused_in_a_line_and_is_no_lack_of_memory(
    contained, calls: tuple[str, ...], overrides: tuple[str, ...], said: str
) -> None:
    done = contained(calls, overrides)
    assert done.exit_code == 2, done.stdout + done.stderr
    row = done.row
    assert (row.status, row.error_type) == ("invalid", "NumaCallError")
    assert row.error_message.startswith(said) and UNCONFINED in row.error_message and row.error_message in done.stderr
    assert ("--cap-add SYS_NICE" in row.error_message) == ("set_mempolicy, which" in said)


def test_tensors_of_torch_have_no_nodes_there(two_nodes) -> None:
    """What memory.pinning=torch meets after its last iteration."""
    code = """
import torch
from ldft.memory.allocator import allocate, pages_by_node, report_of
from ldft.memory.policy import NumaCallError, Placement
from ldft.training.deepspeed import audit
from ldft.training.deepspeed.roles import RoleTensor

try:
    print(pages_by_node(torch.zeros(1000)))
except NumaCallError as error:
    print(error)
print(audit.measure([RoleTensor("momentum", "a", torch.zeros(1000))], None, None)[0].pages)
print(report_of(allocate(1 << 20, torch.uint8, Placement())).pages)
"""
    python = [sys.executable, str(REFUSING), "EPERM", *DOCKER, "--", sys.executable, "-c", code]
    said = subprocess.run(
        python, capture_output=True, text=True, check=True, env=os.environ | two_nodes
    ).stdout.splitlines()
    assert said[0].startswith("numa: finding the nodes of a tensor needs move_pages") and UNCONFINED in said[0]
    assert said[1:] == ["{}", "{}"]
