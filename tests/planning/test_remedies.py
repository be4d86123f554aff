"""What other memory, machines and settings would change: which are tried, and what is said of them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from ldft.config import Config, Device, Goal
from ldft.memory.cost_model import Bandwidths
from ldft.memory.topology import Topology
from ldft.planning import remedies
from ldft.planning.rates import Rates, from_datasheet
from ldft.planning.search import Search

GIB = 2**30
HOST = Bandwidths(cpu={0: 1.0}, h2d={0: 1.0}, d2h={0: 1.0}, link_h2d=5.0, link_d2h=4.0)
RATES = from_datasheet(peak=1.0, device_memory=1.0, host=HOST, peers=7.0)


def search_of(**machine: Any) -> Search:
    """8192 tokens on a GPU of 24 GiB beside 10 GiB of host memory; nothing may be kept from another search."""
    config = Config()
    config.launch.device, config.plan.goal, config.seq_len.tokens = Device.cuda, Goal.fastest, 8192
    config.memory.vram_gib = 24
    for key, value in machine.items():
        setattr(config.machine, key, value)
    topology = Topology(nodes=(), gpus={}, weights={}, weights_auto=None)
    return Search(config, topology, RATES, host_limit=10 * GIB, refusals={"x": 1}, invalid={"y": 1}, _bases={(): None})  # type: ignore[dict-item]


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedies, "device_gib", lambda config: config.memory.vram_gib or None)


def tried(searched: Search, everything: bool) -> dict[str, Search]:
    return dict(remedies._changes(searched, everything))


def test_what_is_tried_where_nothing_fits() -> None:
    found = tried(search_of(), True)
    lengths = {"seq_len=4k": 4096, "seq_len=2k": 2048, "seq_len=512": 512}
    memories = {f"{more} GiB more of host memory": more + 10 for more in (64, 256, 1024)}
    assert set(found) == {*memories, "one more GPU", *lengths, "lora=r16", "optimizer=lion"}
    assert {name: found[name].config.memory.capacity_gib for name in memories} == memories
    assert {name: found[name].config.seq_len.tokens for name in lengths} == lengths
    assert found["lora=r16"].config.lora.rank == 16 and found["optimizer=lion"].config.optimizer.name == "lion"
    for one in found.values():
        assert not (one.refusals or one.invalid or one._bases) and one.host_limit > 0
    # What the run has already is none.
    searched = search_of()
    searched.config.lora.rank, searched.config.optimizer.name = 4, "lion"
    searched.config.seq_len.tokens, searched.config.launch.device = 3, Device.cpu
    assert set(tried(searched, True)) == {*memories, "seq_len=1"}
    searched.config.plan.tokens_per_update = 3
    assert set(tried(searched, True)) == set(memories)


def test_what_is_tried_beside_a_plan() -> None:
    found = tried(search_of(), False)
    one_more = "one more GPU (same tokens on each)"
    assert list(found) == ["64 GiB more of host memory", one_more, "half of the GPU's memory", "seq_len=4k"]
    assert found["half of the GPU's memory"].config.memory.vram_gib == 12
    searched = search_of()
    searched.config.memory.vram_gib = 0  # unknown
    assert "half of the GPU's memory" not in tried(searched, False)


def test_a_second_gpu_is_reached_as_fast_as_the_machine_says_and_a_third_as_fast_as_the_second() -> None:
    name = "one more GPU"
    here = tried(search_of(), True)[name]
    assert (here.config.launch.num_ranks, here.rates.peers) == (2, 5), (
        "over the link: the rate between GPUs is not known"
    )
    assert tried(search_of(name="there", peer_gb_per_s=450), True)[name].rates.peers == 450e9
    searched = search_of(name="there", peer_gb_per_s=450)
    searched.config.launch.num_ranks = 2
    third = tried(searched, True)[name]
    assert (third.config.launch.num_ranks, third.rates) == (3, RATES)
    searched.config.launch.sequence_parallel = 2
    pair = tried(searched, True)["2 more GPUs"]
    assert (pair.config.launch.num_ranks, pair.config.launch.data_parallel) == (4, 2)
    searched.config.launch.sequence_parallel, searched.config.launch.num_hosts = 1, 2
    fourth = tried(searched, True)["one more GPU on each host"]
    assert (fourth.config.launch.num_ranks, fourth.rates) == (4, RATES)


def plan_of(speed: float, config: Config | None = None) -> Any:
    return SimpleNamespace(seconds_per_token=1 / speed, run=SimpleNamespace(config=config or Config()))


def said(monkeypatch: pytest.MonkeyPatch, plan: Any, speeds: dict[str, float | None]) -> list[tuple[str, str]]:
    """What and effect of each remedy, where a change has this speed; None: it does not fit."""

    def changes(searched: Search, everything: bool) -> Any:
        assert everything is (plan is None) and (plan is None or searched.config.seq_len.tokens == 77)
        for what, speed in speeds.items():
            plans = [] if speed is None else [plan_of(speed), None]
            yield what, SimpleNamespace(config=searched.config, within=lambda plans=plans: plans)

    monkeypatch.setattr(remedies, "_changes", changes)
    return [(one.what, one.effect) for one in remedies.remedies(search_of(), plan)]


def test_remedies_of_no_plan_are_those_that_fit_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = said(monkeypatch, None, {"slow": 10.4, "none": None, "fast": 200})
    assert found == [("fast", "200 tokens/s"), ("slow", "10 tokens/s")]


def test_remedies_of_a_plan_are_those_that_change_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(100)
    plan.run.config.seq_len.tokens = 77
    speeds: dict[str, float | None] = {
        "same": 100.9,
        "slower": 99.1,
        "less": 90,
        "none": None,
        "more": 150,
        "little": 102,
    }
    assert said(monkeypatch, plan, speeds) == [
        ("more", "150 tokens/s (+50%)"),
        ("little", "102 tokens/s (+2%)"),
        ("less", "90 tokens/s (-10%)"),
        ("none", "nothing fits"),
    ]


def test_rates_stay_those_of_the_machine() -> None:
    assert isinstance(RATES, Rates)
    for name, one in tried(search_of(), False).items():
        assert one.rates == (dataclasses.replace(RATES, peers=5.0) if "one more" in name else RATES)
