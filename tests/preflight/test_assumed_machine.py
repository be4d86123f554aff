"""A machine that is not here, worked out by hand from its datasheet."""

from __future__ import annotations

import pytest

from ldft import environment
from ldft.config import Config, Device, HostLayout, MachineConfig
from ldft.memory.topology import Topology
from ldft.preflight import assumed_machine

GIB = 2**30


def config_of(host: HostLayout) -> Config:
    config = Config()
    config.machine = MachineConfig(
        name="there", gpu="NVIDIA Some", capability=[8, 6], gpus=4, vram_gib=40, memory_gb_per_s=1, link_gb_per_s=50,
        peer_gb_per_s=1, host=host, cores=12, host_gib=100, host_gb_per_s=160, cxl_gib=30, cxl_gb_per_s=30,
    )  # fmt: skip
    return config


def shapes(topology: Topology) -> list[tuple[int, tuple[int, ...], int, dict[int, int]]]:
    return [(node.id, node.cpus, node.total_bytes, node.distances) for node in topology.nodes]


def test_one_node_has_all() -> None:
    found = assumed_machine.topology(config_of(HostLayout.one_node))
    assert shapes(found) == [(0, tuple(range(12)), 100 * GIB, {0: 10})]
    assert found.gpus == {f"0000:0{place}:00.0": 0 for place in (1, 2, 3, 4)}
    assert (found.weights, found.weights_auto, found.allowed) == ({0: 1}, None, (0,))


def test_two_nodes_have_half_each_and_the_expander_is_farther_away() -> None:
    found = assumed_machine.topology(config_of(HostLayout.two_nodes_cxl))
    first, second = tuple(range(6)), tuple(range(6, 12))
    assert shapes(found) == [
        (0, first, 50 * GIB, {0: 10, 1: 21, 2: 24}),
        (1, second, 50 * GIB, {0: 21, 1: 10, 2: 24}),
        (2, (), 30 * GIB, {0: 24, 1: 24, 2: 10}),
    ]
    assert list(found.gpus.values()) == [0, 0, 1, 1] and found.weights == {0: 1, 1: 1, 2: 1}
    two = assumed_machine.topology(config_of(HostLayout.two_nodes))
    assert [node.total_bytes for node in two.nodes] == [50 * GIB, 50 * GIB]


def test_bandwidths_are_what_training_sustains() -> None:
    # Of the host's 160 GB/s each node has half, of which the update reaches 0.8; the link's 50 carry 0.86 of that, or what the
    # node has.
    found = assumed_machine.bandwidth(config_of(HostLayout.two_nodes_cxl).machine)
    cpu = {name: found[name].pop("cpu") for name in ("node0", "node1", "node2")}
    assert cpu == pytest.approx({"node0": 64, "node1": 64, "node2": 24})
    wide, narrow = pytest.approx({"h2d": 43, "d2h": 43}), pytest.approx({"h2d": 30, "d2h": 30})
    assert found["link"] == found["node0"] == found["node1"] == wide and found["node2"] == narrow
    one = assumed_machine.bandwidth(config_of(HostLayout.one_node).machine)
    assert one["node0"]["cpu"] == pytest.approx(128) and set(one) == {"link", "node0"}


def test_its_gpus_and_memory_are_seen_within_the_context_only() -> None:
    config = config_of(HostLayout.two_nodes_cxl)
    with assumed_machine.assumed(config):
        assert environment.gpus() == ("NVIDIA Some",) * 4 and environment.compute_capability() == (8, 6)
        assert environment.gpu_memory_gib() == 40 and environment.assumed_host_gib() == 130
    assert not environment.gpus_are_assumed()


def test_this_machine_is_itself_unless_gpus_are_asked_for_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    config, here = Config(), Topology(nodes=(), gpus={}, weights={}, weights_auto=None)
    monkeypatch.setattr(assumed_machine, "read_topology", lambda: here)
    assert assumed_machine.topology(config) is here
    monkeypatch.setattr(environment, "_models", lambda: ())
    config.launch.device, config.launch.num_ranks, config.memory.vram_gib = Device.cpu, 2, 24
    with assumed_machine.assumed(config):
        assert not environment.gpus_are_assumed()
    config.launch.device = Device.cuda
    with assumed_machine.assumed(config):
        assert len(environment.gpus()) == 2 and environment.gpu_memory_gib() == 24
        assert environment.assumed_host_gib() is None
    config.memory.vram_gib = 0
    with assumed_machine.assumed(config):
        assert environment.gpu_memory_gib() is None
    monkeypatch.setattr(environment, "_models", lambda: ("NVIDIA Here",))
    with assumed_machine.assumed(config):
        assert environment.gpus() == ("NVIDIA Here",) and not environment.gpus_are_assumed()
