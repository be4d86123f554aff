"""Ranks and cores, on recorded machines; and two runs of two ranks at once on this one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ldft import results
from ldft.memory.topology import Topology, parse_list, read_topology
from ldft.runner import core_binding, launch
from tests.conftest import long
from tests.memory.conftest import write

# Two sockets of eight cores; Linux numbers all first threads before all second ones.
SOCKETS = {0: "0-7,16-23", 1: "8-15,24-31"}
ALL = frozenset(range(32))


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """The sysfs of such a machine with GPUs on these nodes, and their addresses."""

    def build(gpu_nodes: list[int]) -> tuple[Path, list[str]]:
        files = {"devices/system/node/online": "0-1"}
        for node, cpus in SOCKETS.items():
            files[f"devices/system/node/node{node}/cpulist"] = cpus
            files[f"devices/system/node/node{node}/distance"] = "10 21" if node == 0 else "21 10"
            files[f"devices/system/node/node{node}/meminfo"] = f"Node {node} MemTotal: 4096 kB"
        for cpu in ALL:
            name = f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            files[name] = f"{cpu % 16},{cpu % 16 + 16}"
        addresses = [f"0000:{0x17 + 0x11 * i:02x}:00.0" for i in range(len(gpu_nodes))]
        for address, node in zip(addresses, gpu_nodes, strict=True):
            device = f"bus/pci/devices/{address}"
            files |= {f"{device}/vendor": "0x10de", f"{device}/class": "0x030200", f"{device}/numa_node": str(node)}
        return write(tmp_path / "sys", files), addresses

    return build


def split(sysfs: Path, addresses: list[str], ranks: int, usable: frozenset[int] = ALL) -> list[list[int]]:
    topology: Topology = read_topology(sysfs, sysfs / "none")
    return core_binding.split(ranks, addresses, topology, core_binding.physical_cores(usable, sysfs))


def test_eight_ranks_get_whole_cores_of_their_gpus_sockets(machine) -> None:
    sysfs, addresses = machine([0, 0, 0, 0, 1, 1, 1, 1])
    found = split(sysfs, addresses, 8)
    assert found[0] == [0, 1, 16, 17] and found[3] == [6, 7, 22, 23] and found[4] == [8, 9, 24, 25]
    assert sorted(cpu for cores in found for cpu in cores) == sorted(ALL)


def test_ranks_follow_the_order_of_the_visible_gpus(machine) -> None:
    sysfs, addresses = machine([0, 0, 1, 1])
    found = split(sysfs, [addresses[3], addresses[0]], 2)
    assert found == [list(parse_list(SOCKETS[1])), list(parse_list(SOCKETS[0]))]
    # Uneven: two ranks halve a socket, the third has the other to itself.
    assert [len(cores) for cores in split(sysfs, addresses[:3], 3)] == [8, 8, 16]


@pytest.mark.parametrize("nodes", [[0, 0], [-1, -1], [0, -1], [0, 7]])
def test_without_two_known_nodes_all_cores_are_shared_evenly(machine, nodes: list[int]) -> None:
    sysfs, addresses = machine(nodes)
    assert split(sysfs, addresses, 2) == [list(parse_list(SOCKETS[0])), list(parse_list(SOCKETS[1]))]
    assert split(sysfs, [], 4)[0] == [0, 1, 2, 3, 16, 17, 18, 19]


def test_a_cpuset_is_kept_to(machine) -> None:
    sysfs, addresses = machine([0, 1])
    # Nothing near GPU 1: both ranks share what there is.
    assert split(sysfs, addresses, 2, frozenset({0, 1, 2, 3})) == [[0, 1], [2, 3]]
    # One thread of each core only.
    assert split(sysfs, addresses, 2, frozenset({1, 2, 9, 26})) == [[1, 2], [9, 26]]
    assert split(sysfs, addresses, 2, frozenset({5, 21})) == [[5, 21], [5, 21]]
    # More ranks than cores on a socket share those.
    assert split(sysfs, [addresses[0]] * 2 + [addresses[1]], 3, frozenset({4, 8})) == [[4], [4], [8]]


def nodes_of_sixteen(tmp_path: Path, sockets: list[list[int]], gpu_nodes: list[int]) -> tuple[Topology, list[str]]:
    """A machine whose sockets are several nodes of 16 cores each (SNC, NPS), with one GPU on each of `gpu_nodes`."""
    of_socket = {node: number for number, nodes in enumerate(sockets) for node in nodes}
    files = {"devices/system/node/online": ",".join(map(str, of_socket))}
    for node in of_socket:
        folder = f"devices/system/node/node{node}"
        distances = (10 if other == node else 12 if of_socket[other] == of_socket[node] else 32 for other in of_socket)
        files[f"{folder}/cpulist"] = f"{16 * node}-{16 * node + 15}" if node < 8 else ""
        files[f"{folder}/distance"] = " ".join(map(str, distances))
    addresses = [f"0000:{0x17 + i:02x}:00.0" for i in range(len(gpu_nodes))]
    for address, node in zip(addresses, gpu_nodes, strict=True):
        device = f"bus/pci/devices/{address}"
        files |= {f"{device}/vendor": "0x10de", f"{device}/class": "0x030200", f"{device}/numa_node": str(node)}
    return read_topology(write(tmp_path / "sys", files), tmp_path / "none"), addresses


@pytest.mark.parametrize(
    ("sockets", "gpu_nodes", "cores_of_nodes"),
    [
        # DGX A100, NPS4: four GPUs a socket on two of its four nodes. Nodes 0 and 2 are as near to 1 as to 3.
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [3, 3, 1, 1, 7, 7, 5, 5], {3: (2, 3), 1: (0, 1), 7: (6, 7), 5: (4, 5)}),
        # Two sockets, SNC2, all GPUs of a socket on its first node.
        ([[0, 1], [2, 3]], [0, 0, 0, 0, 2, 2, 2, 2], {0: (0, 1), 2: (2, 3)}),
        ([[0, 1], [2, 3]], [1, 3], {1: (0, 1), 3: (2, 3)}),
        # One socket has GPUs on both nodes, the other none: as far from both, shared out.
        ([[0, 1], [2, 3]], [0, 1], {0: (0, 2), 1: (1, 3)}),
        # Every node has GPUs: each keeps its own.
        ([[0, 1], [2, 3]], [2, 0, 3, 1], {0: (0,), 1: (1,), 2: (2,), 3: (3,)}),
        # GPUs of nodes without cores are served by the nearest with some.
        ([[0, 8], [1, 9]], [8, 9], {8: (0,), 9: (1,)}),
    ],
)
def test_no_core_is_idle_on_nodes_without_gpus(tmp_path: Path, sockets, gpu_nodes, cores_of_nodes) -> None:
    topology, addresses = nodes_of_sixteen(tmp_path, sockets, gpu_nodes)
    cores = [(cpu,) for node in topology.nodes for cpu in node.cpus]
    found = core_binding.split(len(addresses), addresses, topology, cores)
    assert sorted(cpu for mine in found for cpu in mine) == sorted(cpu for (cpu,) in cores)  # each once
    for node, nearest in cores_of_nodes.items():
        together = {cpu // 16 for mine, of in zip(found, gpu_nodes, strict=True) if of == node for cpu in mine}
        assert together == set(nearest), (node, together)
    assert len({len(mine) for mine in found}) == 1  # equal shares


def test_ties_are_shared_out_by_ranks(tmp_path: Path) -> None:
    # Three ranks on node 0, one on node 1: of the other socket's 32 cores node 1's rank gets a quarter.
    topology, addresses = nodes_of_sixteen(tmp_path, [[0, 1], [2, 3]], [0, 0, 0, 1])
    found = core_binding.split(4, addresses, topology, [(cpu,) for cpu in range(64)])
    assert sum(len(mine) for mine in found[:3]) == 16 + 24 and len(found[3]) == 16 + 8


def test_openmp_binds_no_rank_to_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    with launch.Ranks(tmp_path, 1, "cpu") as ranks:
        (pid,) = ranks.pids
        found = [line for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"PROC_BIND" in line]
    assert found == [b"OMP_PROC_BIND=false"]


@long
def test_two_runs_at_once_do_not_meet(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    started = [
        subprocess.Popen(
            command("launch.num_ranks=2", f"train.seed={seed}", f"results.dir={tmp_path}/{seed}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in (1, 2)
    ]
    said = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    first, second = (results.read(tmp_path / str(seed)).iloc[0] for seed in (1, 2))
    assert first.loss[0] != second.loss[0]
    # Alone it trains on the very same numbers: no gradient came from the other run.
    alone = subprocess.run(
        command("launch.num_ranks=2", "train.seed=1", f"results.dir={tmp_path}/alone"), check=True, capture_output=True
    )
    assert alone.returncode == 0
    assert list(results.read(tmp_path / "alone").iloc[0].loss) == list(first.loss)
