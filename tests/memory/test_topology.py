"""The machine as sysfs shows it, from recorded trees and from the machine at hand."""

import os

import pytest

from ldft.memory.topology import format_list, node_meminfo, parse_list, read_topology, read_weights


def test_nodes_cpus_sizes_and_distances(sysfs, status):
    topology = read_topology(sysfs, status)
    assert [n.id for n in topology.nodes] == [0, 1, 2, 5]
    assert topology.node(0).cpus == (0, 1, 4) and topology.node(2).cpus == ()
    assert topology.node(2).total_bytes == 8192 * 1024
    assert topology.node(5).distances == {0: 24, 1: 14, 2: 26, 5: 10}  # one distance an online node: 5 is the fourth
    assert topology.memory_nodes == (0, 1, 2)
    assert topology.gpus == {"0000:17:00.0": 1}
    with pytest.raises(KeyError):
        topology.node(3)


def test_a_node_without_cpus_is_served_by_the_nearest_that_has_some(sysfs, status):
    topology = read_topology(sysfs, status)
    assert topology.cpus_nearest(1) == (2, 3)
    assert topology.cpus_nearest(2) == (0, 1, 4)
    assert topology.cpus_nearest(5) == (2, 3)
    assert topology.cpus_nearest(5, frozenset({1, 4})) == (1, 4)  # only CPUs that the process may run on
    assert topology.cpus_nearest(0, frozenset({77})) == ()


def test_a_cpuset_hides_nodes(sysfs, tmp_path):
    allowed = tmp_path / "status"
    allowed.write_text("Mems_allowed_list:\t0,2\n")
    assert read_topology(sysfs, allowed).memory_nodes == (0, 2)


@pytest.mark.parametrize(
    ("name", "text", "auto"), [("auto", "1", True), ("__auto_type", "0", False), ("auto", "Y", True)]
)
def test_the_automatic_weights_are_found_under_either_name(sysfs, name, text, auto):
    assert read_weights(sysfs) == ({0: 1, 1: 1, 2: 2, 5: 1}, None)
    (sysfs / "kernel/mm/mempolicy/weighted_interleave" / name).write_text(text + "\n")
    assert read_weights(sysfs) == ({0: 1, 1: 1, 2: 2, 5: 1}, auto)


def test_a_kernel_without_numa_is_one_node(tmp_path):
    topology = read_topology(tmp_path, tmp_path / "none")
    assert [n.id for n in topology.nodes] == [0] and topology.memory_nodes == (0,)
    assert topology.node(0).total_bytes > 0 and len(topology.node(0).cpus) >= 1
    assert not topology.has_weighted_interleave


def test_this_machine():
    topology = read_topology()
    cpus = {cpu for node in topology.nodes for cpu in node.cpus}
    assert os.sched_getaffinity(0) <= cpus
    for node in topology.nodes:
        assert node.distances[node.id] == 10
        if node.total_bytes:
            assert 0 < node_meminfo(node.id)["MemFree"] <= node.total_bytes


@pytest.mark.parametrize(("text", "numbers"), [("0-2,7", (0, 1, 2, 7)), ("0", (0,)), ("", ()), ("3-3,5,6", (3, 5, 6))])
def test_lists_of_the_kernel(text, numbers):
    assert parse_list(text + "\n") == numbers
    assert parse_list(format_list(numbers)) == numbers


def test_lists_are_written_short():
    assert format_list((3, 0, 1, 2, 8, 9)) == "0-3,8-9"
