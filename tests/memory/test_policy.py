"""Placements: what is valid where, what the user reads when it is not, and the process's own policy."""

import errno
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ldft import _native
from ldft.memory.policy import (
    MPOL_BIND,
    HostMemoryError,
    NumaCallError,
    Placement,
    PlacementError,
    is_harmless,
    kernel_has_weights,
    kernel_policy,
    process_policy,
    refused,
    require_kernel_weights,
    set_process_policy,
)
from ldft.memory.topology import read_topology


@pytest.fixture
def topology(sysfs, status):
    return read_topology(sysfs, status)


@pytest.mark.parametrize(
    ("placement", "line"),
    [
        (
            Placement(kind="bind", nodes=(3,)),
            'numa.nodes: node 3 does not exist on this machine (online: 0-2,5); choose from those, or see README, "Trying it '
            'without NUMA hardware"',
        ),
        (Placement(kind="bind", nodes=(5,)), "numa.nodes: node 5 has no memory (nodes with memory: 0-2)"),
        (Placement(kind="bind"), "numa.nodes: kind bind needs at least one node"),
        (Placement(kind="interleave", nodes=(0, 0)), "numa.nodes: [0, 0] lists a node twice"),
        (Placement(kind="interleave", nodes=(-1,)), "numa.nodes: [-1] must be node numbers"),
        (Placement(kind="default", nodes=(0,)), "numa.nodes: kind default takes no nodes"),
        (Placement(kind="interleave", weights=(1,)), "numa.weights: kind interleave takes no weights"),
        (
            Placement(kind="weighted_interleave", nodes=(0, 1), weights=(1,)),
            "numa.weights: 1 weight for 2 nodes (0-1)",
        ),
        (Placement(kind="weighted_interleave", weights=(1, 2)), "numa.weights: 2 weights for 3 nodes (0-2)"),
        (Placement(kind="weighted_interleave", nodes=(0,), weights=(0,)), "numa.weights: 0 must be an integer from 1"),
        (
            Placement(kind="weighted_interleave", nodes=(0,), weights=(2**20 + 1,)),
            "numa.weights: 1048577 must be an integer from 1 to 1048576",
        ),
        (Placement(kind="weighted_interleave", nodes=(0,), weights=(True,)), "numa.weights: True must be an integer"),
        (
            Placement(kind="weighted_interleave", nodes=(0,)),
            "numa.weights: 0 weights for 1 node (0); give one per node",
        ),
        (Placement(kind="interleave", nodes=(True,)), "numa.nodes: [True] must be node numbers"),
        (Placement(kind="preferred"), "numa.nodes: kind preferred needs at least one node"),
        (Placement(kind="spread"), "numa.kind: 'spread' is unknown; choose from default, bind, preferred"),
        (Placement(kind="interleave", method="magic"), "numa.method: 'magic' is unknown"),
    ],
)
def test_a_wrong_placement_is_one_line_with_key_value_and_fix(topology, placement, line):
    with pytest.raises(PlacementError) as error:
        placement.resolve(topology)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_node_outside_the_cpuset_is_named(sysfs, tmp_path):
    status = tmp_path / "status"
    status.write_text("Mems_allowed_list:\t0\n")
    with pytest.raises(PlacementError, match=r"node 1 is outside this process's cpuset \(allowed: 0\)"):
        Placement(kind="bind", nodes=(1,)).resolve(read_topology(sysfs, status))


def test_shares(topology):
    assert Placement(kind="bind", nodes=(2,)).shares() == {2: 1.0}
    assert Placement(kind="bind", nodes=(0, 2)).shares() is None
    assert Placement().shares() is None
    assert Placement(kind="interleave").resolve(topology).shares() == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert Placement(kind="weighted_interleave", nodes=(0, 2), weights=(1, 3)).shares() == {0: 0.25, 2: 0.75}


def test_what_is_possible_stays_as_it_is(topology):
    placement = Placement(kind="weighted_interleave", nodes=(0, 2), weights=(1, 2**20))
    assert placement.resolve(topology) == placement
    assert Placement().resolve(topology) == Placement()
    assert Placement(kind="preferred", nodes=(2,)).shares() == {2: 1.0}
    assert Placement(kind="interleave").shares() is None


def test_a_placement_is_described_in_a_few_words():
    assert Placement().describe() == "default"
    assert Placement(kind="bind", nodes=(3,)).describe() == "bind of node 3"
    assert Placement(kind="interleave", nodes=(0, 1, 3)).describe() == "interleave of nodes 0-1,3"
    weighted = Placement(kind="weighted_interleave", nodes=(0, 1, 3), weights=(4, 2, 1))
    assert weighted.describe() == "weighted_interleave of nodes 0,1,3 by 4:2:1"


# The numbers of linux/mempolicy.h.
@pytest.mark.parametrize(
    ("placement", "mode"),
    [
        (Placement(), 0),
        (Placement(kind="preferred", nodes=(0,)), 1),
        (Placement(kind="interleave", nodes=(0, 2)), 3),
        (Placement(kind="preferred", nodes=(0, 2)), 5),
        (Placement(kind="weighted_interleave", nodes=(0, 2), weights=(1, 2)), 6),
    ],
)
def test_the_kernels_policy_is_set_and_read(topology, monkeypatch, placement, mode):
    flags = 0xE000  # what numactl may add
    assert kernel_policy(placement) == (mode, placement.nodes)
    monkeypatch.setattr(_native, "thread_policy", lambda: (mode | flags, list(placement.nodes)))
    assert process_policy(topology) == placement


def test_other_policies_of_the_kernel_are_read(topology, monkeypatch):
    for seen, placement in (
        ((2, [1]), Placement(kind="bind", nodes=(1,))),
        ((4, [0]), Placement()),  # local
        ((1, []), Placement()),
        ((7, [0]), Placement()),  # of a kernel to come
        (
            (6, [0, 5]),
            Placement(kind="weighted_interleave", nodes=(0, 5), weights=(3, 1)),
        ),  # a node's weight is 1 at first
    ):
        monkeypatch.setattr(_native, "thread_policy", lambda seen=seen: seen)
        assert process_policy(replace(topology, weights={0: 3})) == placement


def test_a_forbidden_call_is_harmless_where_there_is_one_node(topology, monkeypatch):
    one = replace(topology, nodes=topology.nodes[:1], allowed=(0,))
    forbidden, other = OSError(errno.EPERM, "not permitted"), OSError(errno.EINVAL, "invalid")
    here, there = Placement(kind="bind", nodes=(0,)), Placement(kind="bind", nodes=(1,))
    assert is_harmless(forbidden, here, one) and is_harmless(OSError(errno.ENOSYS, ""), Placement(), one)
    assert not is_harmless(other, here, one)
    assert not is_harmless(forbidden, there, one) and not is_harmless(forbidden, here, topology)

    def refuse(mode, nodes):
        raise forbidden

    monkeypatch.setattr(_native, "set_thread_policy", refuse)
    assert set_process_policy(here, one) == here
    with pytest.raises(NumaCallError, match=r"^numa: bind of node 0 needs set_mempolicy, which is forbidden here"):
        set_process_policy(here, topology)


def test_a_refused_call_is_one_line_with_its_fix():
    forbidden = OSError(errno.EPERM, "Operation not permitted")
    assert "in a container use --cap-add SYS_NICE, or --sec" in str(refused(forbidden, "set_mempolicy", "it"))
    assert "in a container use --security-opt" in str(refused(forbidden, "move_pages", "it"))
    for number, said in ((errno.EINVAL, "does not know this policy"), (errno.ENOMEM, "no memory for another mapping")):
        error = refused(OSError(number, "x"), "mbind", "it")
        assert isinstance(error, HostMemoryError) and str(error).startswith("mbind: it was refused: ")
        assert said in str(error)
    assert str(refused(OSError(errno.EIO, "broken"), "mbind", "it")) == "mbind: it was refused: broken"


def test_the_kernel_is_never_asked_to_bind(topology):
    # It would kill the process when the node is full.
    for nodes in ((0,), (0, 2)):
        placement = Placement(kind="bind", nodes=nodes).resolve(topology)
        assert kernel_policy(placement)[0] != MPOL_BIND


def test_weights_of_the_kernel_match_up_to_a_factor(topology):
    def has(nodes, weights):
        return kernel_has_weights(Placement(kind="weighted_interleave", nodes=nodes, weights=weights), topology)

    assert has((0, 2), (1, 2)) and has((2, 0), (4, 2)) and has((0, 1), (3, 3))
    assert not has((0, 2), (2, 1)) and not has((0, 1, 2), (1, 1, 1)) and not has((0, 9), (1, 1))


def test_the_process_cannot_be_weighted_against_the_kernels_weights(topology):
    wanted = Placement(kind="weighted_interleave", nodes=(0, 2), weights=(1, 3))
    with pytest.raises(PlacementError) as error:
        set_process_policy(wanted, topology)
    folder = "/sys/kernel/mm/mempolicy/weighted_interleave"
    assert "are 1:2, not 1:3" in str(error.value)
    assert f"echo 1 > {folder}/node0; echo 3 > {folder}/node2" in str(error.value)


def test_weights_for_a_whole_process_need_a_kernel_that_has_them(topology):
    def require(weights, of=topology, **how):
        placement = Placement(kind="weighted_interleave", nodes=(0, 2), weights=weights)
        require_kernel_weights(placement, of, "numa", **how)

    require((1, 2))
    require((1, 255), ratio=False)
    with pytest.raises(PlacementError, match=r"^numa\.weights: 256 is above the kernel's largest weight, 255$"):
        require((1, 256), ratio=False)
    with pytest.raises(PlacementError, match=r"^numa\.weights: the kernel's weights for nodes 0,2 are 1:2, not 1:255"):
        require((1, 255))
    with pytest.raises(PlacementError, match=r"^numa\.kind: .* needs Linux 6\.9 or later"):
        require((1, 2), replace(topology, weights={}))


def in_fresh_process(code):
    """Policies belong to threads and cannot be taken back for pages: each test in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["bind", "preferred", "interleave"])
def test_the_policy_set_is_the_policy_read_in_this_thread_and_its_children(kind):
    code = f"""
import json, subprocess, sys, threading
from ldft.memory.policy import Placement, process_policy, set_process_policy
set_process_policy(Placement(kind={kind!r}, nodes=(0,)))
seen = [process_policy().describe()]
thread = threading.Thread(target=lambda: seen.append(process_policy().describe()))
thread.start(); thread.join()
child = "from ldft.memory.policy import process_policy; print(process_policy().describe())"
seen.append(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip())
line = next(l for l in open("/proc/self/numa_maps") if "[stack]" in l or " stack " in l)
print(json.dumps([seen, line.split()[1]]))
"""
    seen, kernel = in_fresh_process(code)
    expected = {"interleave": "interleave of node 0"}.get(kind, "preferred of node 0")
    assert seen == [expected] * 3
    assert kernel.split(":")[0].split("=")[0] in ("interleave", "prefer")  # the kernel's word, not ours


def test_without_a_policy_it_is_default():
    assert (
        in_fresh_process(
            "import json; from ldft.memory.policy import process_policy; print(json.dumps(process_policy().kind))"
        )
        == "default"
    )


def test_importing_policy_topology_and_probe_is_light():
    code = """
import json, sys, time
start = time.perf_counter()
import ldft.memory.kernel_weights, ldft.memory.limits, ldft.memory.placing, ldft.memory.policy, ldft.memory.probe
print(json.dumps([[m for m in ("torch", "numpy", "hydra", "omegaconf") if m in sys.modules], time.perf_counter() - start]))
"""
    heavy, seconds = in_fresh_process(code)
    assert heavy == []
    assert seconds < 2.0  # 0.05 s on an idle machine


def test_process_policy_of_this_thread_is_readable():
    assert process_policy().kind in ("default", "bind", "preferred", "interleave", "weighted_interleave")
