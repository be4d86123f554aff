"""Cases: the policy of a whole process, and the kernel's weights that it borrows. Runs in the emulated machine.

Each is about fresh processes (child.py), looked at from outside.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from .guest_placement import WEIGHTS, reader, set_kernel_weights
from .suite import Cases, check

CASES = Cases()
ALL = (0, 1, 2, 3)
POLICIES: dict[str, dict] = {
    "bind_0": {"kind": "bind", "nodes": [0]},
    "bind_3": {"kind": "bind", "nodes": [3]},
    "interleave_0_3": {"kind": "interleave", "nodes": [0, 3]},
    "weighted_0_3": {"kind": "weighted_interleave", "nodes": [0, 3], "weights": [1, 2]},
    "weighted_1_2_3": {"kind": "weighted_interleave", "nodes": [0, 2, 3], "weights": [1, 2, 3]},
    "interleave_all": {"kind": "interleave"},
}
# A process's own policy deals out nodes one page after another, whatever takes the page: a tensor, a table, a stack.
TOLERANCE = 0.005


class Child:
    """A process of child.py. Leaving the block ends it."""

    def __init__(self, action: str, placement: dict | None = None, *, prefix: tuple[str, ...] = ()) -> None:
        words = [*prefix, sys.executable, "-m", "numa_vm.child", action, json.dumps(placement or {})]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.said = json.loads(self.process.stdout.readline() or '{"error": "it died; its traceback is above"}')

    def __enter__(self) -> "Child":
        check("error" not in self.said, self.said.get("error"))
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> dict:
        self.process.communicate("\n" if self.process.poll() is None else None)
        return self.said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def kernel_weights() -> list[int]:
    return [int((WEIGHTS / f"node{node}").read_text()) for node in ALL]


def check_ranges(pid: int, ranges: list, placement: dict, who: str) -> dict[int, int]:
    """Pages of plain memory of a process are where its policy says."""
    counts: dict[int, int] = {}
    for found in reader()(pid, ranges)["exact_nodes"]:
        for node, number in found.items():
            counts[node] = counts.get(node, 0) + number
    nodes = placement.get("nodes") or ALL
    weights = placement.get("weights") or [1] * len(nodes)
    total = sum(counts.values())
    check(total == sum(size for _, size in ranges) // 4096, f"{who}: {counts}")
    for node in {*nodes, *counts}:
        wanted = dict(zip(nodes, weights, strict=True)).get(node, 0) / sum(weights)
        share = counts.get(node, 0) / total
        check(abs(share - wanted) <= TOLERANCE, f"{who}: node {node} has {share:.4f}, wanted {wanted:.4f}: {counts}")
    return counts


def check_process_memory(pid: int) -> None:
    """process_memory of a process that stands still is what numa_maps holds."""
    from ldft.memory.probe import process_memory

    seen = reader()(pid, [])["nodes"]
    said = {node: memory.total // 4096 for node, memory in process_memory([pid]).nodes.items() if memory.total}
    check(said == seen, f"process_memory says {said} pages, the witness {seen}")


def process_policy(name: str) -> dict:
    set_kernel_weights(ALL, (1, 1, 1, 1))
    placement = POLICIES[name]
    with Child("policy", placement) as child:
        counts = check_ranges(child.process.pid, child.said["ranges"], placement, "the process")
        check_ranges(child.said["heir"], child.said["heir_ranges"], placement, "a process that it started")
        kind, nodes, weights = child.said["heir_policy"]
        check(kind in (placement["kind"], "preferred"), f"the policy reads back as {child.said['heir_policy']}")
        check(nodes == list(placement.get("nodes") or ALL), f"the policy reads back as {child.said['heir_policy']}")
        check(weights == placement.get("weights", []), f"the policy reads back as {child.said['heir_policy']}")
        check_process_memory(child.process.pid)
    check(kernel_weights() == [1, 1, 1, 1], f"afterwards the kernel's weights are {kernel_weights()}")
    return {"pages": counts}


for _name in POLICIES:
    CASES.add(f"process_{_name}", _name)(process_policy)


@CASES.add("process_default_inherits_numactl")
def inherits_numactl() -> None:
    """With numa=default, `numactl ... python -m ldft` keeps numactl's policy, and the row records it."""
    with Child("inherit", prefix=("numactl", "--interleave=1,2")) as child:
        check(child.said["policy"] == ["interleave", [1, 2], []], child.said["policy"])
        check_ranges(child.process.pid, child.said["ranges"], {"nodes": [1, 2]}, "under numactl")


@CASES.add("process_unknown_node_is_one_line")
def unknown_node() -> dict:
    said = Child("policy", {"kind": "bind", "nodes": [7]}).end()
    check("node 7 does not exist on this machine (online: 0-3)" in said.get("error", ""), said)
    check("\n" not in said["error"], said)
    return said


@CASES.add("weights_come_back_after_the_run_and_after_an_exception")
def weights_come_back() -> None:
    set_kernel_weights(ALL, (7, 5, 4, 9))
    with Child("weights", POLICIES["weighted_0_3"]):
        check(kernel_weights() == [1, 5, 4, 2], f"in the run: {kernel_weights()}")
    check(kernel_weights() == [7, 5, 4, 9], f"after the run: {kernel_weights()}")
    with Child("fail_inside", POLICIES["weighted_0_3"]):
        check(kernel_weights() == [7, 5, 4, 9], f"after an exception: {kernel_weights()}")


@CASES.add("weights_come_back_after_kill_9")
def weights_come_back_after_kill() -> None:
    """A killed run leaves its weights and its journal; the next start puts back what was there before it."""
    set_kernel_weights(ALL, (7, 5, 4, 9))
    child = Child("weights", POLICIES["weighted_0_3"])
    check(kernel_weights() == [1, 5, 4, 2], f"in the run: {kernel_weights()}")
    child.kill()
    check(kernel_weights() == [1, 5, 4, 2], "the kill put the weights back?")
    with Child("restore") as child:
        check(child.said == {"restored": True}, child.said)
        check(kernel_weights() == [7, 5, 4, 9], f"after the next start: {kernel_weights()}")
    # And when the next start wants other weights: what it puts back at its end is from before the killed one.
    Child("weights", POLICIES["weighted_0_3"]).kill()
    with Child("weights", POLICIES["weighted_1_2_3"]):
        check(kernel_weights() == [1, 5, 2, 3], f"in the second run: {kernel_weights()}")
    check(kernel_weights() == [7, 5, 4, 9], f"after the second run: {kernel_weights()}")
    with Child("restore") as child:
        check(child.said == {"restored": False}, child.said)


@CASES.add("weights_are_borrowed_by_one_run_at_a_time")
def weights_lock() -> dict:
    set_kernel_weights(ALL, (1, 1, 1, 1))
    with Child("weights", POLICIES["weighted_0_3"]) as first:
        for other in ("weighted_1_2_3", "weighted_0_3"):
            said = Child("weights", POLICIES[other]).end()
            check(f"(process {first.process.pid})" in said.get("error", ""), f"{other}: {said}")
        with Child("restore") as child:
            check(child.said == {"restored": False}, "a start took the weights from a run that lives")
        check(kernel_weights() == [1, 1, 1, 2], f"the second one changed them: {kernel_weights()}")
    return said


@CASES.add("weights_that_we_may_not_write_name_the_commands")
def weights_without_rights() -> dict:
    """Without the right to write there (a container, where /sys is read-only): one line that has the commands for root, and once
    root ran them it works."""
    jail = ("unshare", "--mount", "sh", "-c", 'mount -o remount,bind,ro /sys && exec "$@"', "sh")
    set_kernel_weights(ALL, (1, 1, 1, 1))
    said = Child("policy", POLICIES["weighted_0_3"], prefix=jail).end()
    commands = f"echo 1 > {WEIGHTS}/node0; echo 2 > {WEIGHTS}/node3"
    check(commands in said.get("error", ""), said)
    subprocess.run(["sh", "-c", commands], check=True)
    with Child("policy", POLICIES["weighted_0_3"], prefix=jail) as child:
        check_ranges(child.process.pid, child.said["ranges"], POLICIES["weighted_0_3"], "without rights")
    set_kernel_weights(ALL, (1, 1, 1, 1))
    return said


@CASES.add("process_memory_of_this_process")
def own_memory() -> None:
    """This process has torch, files, a heap and stacks: the table is within what moves while it is being read."""
    from ldft.memory.probe import process_memory

    seen = reader()(os.getpid(), [])["nodes"]
    said = process_memory([os.getpid()])
    total = sum(memory.total for memory in said.nodes.values()) / 4096
    check(abs(total - sum(seen.values())) < 512, f"{total:.0f} pages, the witness {sum(seen.values())}")
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    check(abs(total - resident) < 0.02 * resident, f"{total:.0f} pages, resident {resident}")
