"""Ranks and cores, on recorded machines; and two runs of two ranks at once on this one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ldft import binding, launch, results
from ldft.memory.topology import Topology, parse_list, read_topology
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
    return binding.split(ranks, addresses, topology, binding.physical_cores(usable, sysfs))


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
