"""Rates of a machine, worked out by hand: from datasheets, and as they stand in a profile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ldft import environment
from ldft.config import Config, Device, Goal, Precision
from ldft.errors import ConfigError
from ldft.memory import bandwidths
from ldft.memory.cost_model import Bandwidths
from ldft.planning import machine
from ldft.planning.rates import HostTime, Rates, from_datasheet

HOST = Bandwidths(cpu={0: 1e9}, h2d={0: 2e9}, d2h={0: 2e9}, link_h2d=2e9, link_d2h=2e9)


def test_of_a_datasheet_training_sustains_a_part() -> None:
    rates = from_datasheet(peak=1000.0, device_memory=100.0, host=HOST, peers=7.0)
    assert (rates.products, rates.device_memory, rates.peers, rates.launches_beside) == pytest.approx((720, 85, 7, 0.5))
    assert rates.host is HOST and not rates.measured
    # Attention with wide heads; with narrow ones 0.73 of that forward and 0.65 backward. At every length.
    assert rates.attention_of(128, 100) == pytest.approx((550, 490))
    assert rates.attention_of(64, 1 << 20) == pytest.approx((550 * 0.73, 490 * 0.65))
    assert from_datasheet(peak=1.0, device_memory=1.0, host=HOST).peers == math.inf


def test_attention_of_other_heads_and_lengths() -> None:
    lengths = {100: (1.0, 10.0), 1600: (3.0, 50.0), 3200: (4.0, 60.0)}
    rates = Rates(
        products=1, attention={64: lengths, 128: {100: (9.0, 9.0)}}, device_memory=1, host=HOST, launches_beside=1, peers=1,
        fetched=HostTime(1, 1, 1), resident=HostTime(1, 1, 1), measured=True,
    )  # fmt: skip
    # By the logarithm: 400 is half of the way from 100 to 1600, 200 a quarter.
    assert rates.attention_of(64, 400) == pytest.approx((2, 30))
    assert rates.attention_of(64, 200) == pytest.approx((1.5, 20))
    assert [rates.attention_of(64, tokens) for tokens in (50, 100, 1600, 3200, 9999)] == [
        (1, 10), (1, 10), (3, 50), (4, 60), (4, 60),
    ]  # fmt: skip
    # The nearest width; of two as near, the narrower.
    assert [rates.attention_of(width, 100)[0] for width in (32, 95, 96, 97, 256)] == [1, 1, 1, 9, 9]


def there(**values: Any) -> Config:
    """On one H200 by its datasheet, with a host of 10 GB/s."""
    config = Config()
    config.machine.name, config.machine.gpu = "there", "NVIDIA H200"
    config.machine.memory_gb_per_s, config.machine.peer_gb_per_s = 4000.0, 450.0
    config.numa.bandwidth = {"node0": {"cpu": 10}}
    config.train.precision, config.launch.device, config.plan.goal = Precision.bf16, Device.cuda, Goal.fastest
    for name, value in values.items():
        setattr(config.machine, name, value)
    return config


def test_of_a_machine_that_is_not_here_the_datasheet_counts() -> None:
    config = there()
    rates = machine.rates(config)
    assert (rates.products, rates.device_memory) == pytest.approx((0.72 * 989e12, 0.85 * 4e12))
    assert rates.peers == math.inf and rates.host.cpu == {0: 10e9} and not rates.measured
    config.launch.num_ranks = 2
    assert machine.rates(config).peers == 450e9
    # Between hosts what a host's network carries counts, or what its GPUs do, if that is less.
    config.launch.num_ranks, config.launch.num_hosts, config.machine.network_gb_per_s = 4, 2, 50.0
    assert machine.rates(config).peers == 50e9
    config.machine.network_gb_per_s = 800.0
    assert machine.rates(config).peers == 450e9
    config.launch.num_ranks = 2  # one on each host
    assert machine.rates(config).peers == 800e9
    config.machine.network_gb_per_s = 0.0
    with pytest.raises(
        machine.UnknownRatesError, match=r"machine\.network_gb_per_s: 0: what moves between several hosts"
    ):
        machine.rates(config)
    config.launch.num_hosts = 1
    config.train.precision = Precision.fp32
    assert machine.rates(config).products == pytest.approx(0.72 * 989e12 / 8)
    with pytest.raises(machine.UnknownRatesError, match="'NVIDIA Other': its peak is not known here"):
        machine.rates(there(gpu="NVIDIA Other"))


PROFILE: dict[str, Any] = {
    "products_tflops_per_s": 600.0,
    "attention_tflops_per_s": {"128": {"8192": [500.0, 400.0]}},
    "memory_gb_per_s": 4000.0,
    "peer_gb_per_s": 300.0,
    "launches_beside": 0.9,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile of this machine, which has no GPU unless a test says so."""
    monkeypatch.setattr(bandwidths, "profile_path", lambda: tmp_path / "profile.json")
    return tmp_path / "profile.json"


def config_here(device: Device = Device.cpu) -> Config:
    config = there()
    config.machine.name, config.launch.device = "this", device
    return config


def test_a_profile_is_read_in_its_units(here: Path) -> None:
    config = config_here()
    here.write_text(json.dumps({"devices": {"cpu bf16": PROFILE}}))
    rates = machine.rates(config)
    assert (rates.products, rates.attention) == (600e12, {128: {8192: (500e12, 400e12)}})
    assert (rates.device_memory, rates.launches_beside, rates.peers, rates.measured) == (4e12, 0.9, math.inf, True)
    assert rates.host.cpu == {0: 10e9}
    config.launch.num_ranks = 2
    assert machine.rates(config).peers == 300e9
    here.write_text(json.dumps({"devices": {"cpu bf16": PROFILE | {"peer_gb_per_s": None}}}))
    assert machine.rates(config).peers == math.inf, "measured with one GPU"
    config.train.precision = Precision.fp32
    with pytest.raises(machine.UnknownRatesError, match="the rates of cpu fp32 are unknown"):
        machine.rates(config)


# Times are divided by each of these.
NO_RATES: list[Any] = [0, -5, math.nan, math.inf, True, "600", None]
NO_LENGTHS: list[Any] = [{}, [], None, {"128": {}}, {"128": {"0": [1.0, 1.0]}}, {"128": {"8192": [500.0, 0]}}]
DAMAGED = [
    *(("products_tflops_per_s", value) for value in NO_RATES),
    *(("attention_tflops_per_s", value) for value in NO_LENGTHS),
    *(("memory_gb_per_s", 0), ("launches_beside", 0), ("launches_beside", "x")),
]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "fastest: the profile .* cannot be read; measure this machine once"),
        ("[]", "cannot be read"),
        ('{"devices": []}', "cannot be read"),
        ('{"devices": null}', "cannot be read"),
        ('{"devices": {"cpu bf16": 5}}', "is damaged"),
        *((json.dumps({"devices": {"cpu bf16": PROFILE | {key: value}}}), "is damaged") for key, value in DAMAGED),
        (
            json.dumps({"devices": {"cpu bf16": PROFILE | {"attention_tflops_per_s": {"128": {"1": [5.0]}}}}}),
            "is damaged",
        ),
        ("{}", "the rates of cpu bf16 are unknown"),
        (None, "the rates of cpu bf16 are unknown"),
    ],
)
def test_a_profile_that_does_not_serve_is_one_line(here: Path, text: str | None, line: str) -> None:
    if text is not None:
        here.write_text(text)
    with pytest.raises(ConfigError, match=line):
        machine.rates(config_here())


def test_gpus_that_are_assumed_have_no_rates_and_those_of_others_do_not_count(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_here(Device.cuda)
    with environment.assumed(environment.Assumed(1, 80)), pytest.raises(machine.UnknownRatesError, match="no GPU here"):
        machine.rates(config)
    monkeypatch.setattr(environment, "gpus", lambda: ("NVIDIA H200", "another"))
    monkeypatch.setattr(environment, "driver", lambda: "5")
    host_s = {"fetched": [1e-3, 2e-3, 3e-3], "resident": [4e-3, 5e-3, 6e-3]}
    profile = PROFILE | {"gpu": "NVIDIA H200", "driver": "5", "layer_host_s": host_s}
    here.write_text(json.dumps({"devices": {"cuda bf16": profile}}))
    found = machine.rates(config)
    assert found.measured and (found.fetched, found.resident) == (
        HostTime(1e-3, 2e-3, 3e-3),
        HostTime(4e-3, 5e-3, 6e-3),
    )
    for times in ([1e-3], ["a", "b", "c"], [-1.0, 2.0, 3.0], [math.inf] * 3):
        here.write_text(json.dumps({"devices": {"cuda bf16": profile | {"layer_host_s": host_s | {"fetched": times}}}}))
        with pytest.raises(ConfigError, match="is damaged"):
            machine.rates(config)
    for key, other in (("gpu", "NVIDIA H100"), ("driver", "4")):
        here.write_text(json.dumps({"devices": {"cuda bf16": profile | {key: other}}}))
        with pytest.raises(machine.UnknownRatesError, match=f"measured with {key} {other}, here is"):
            machine.rates(config)
    here.write_text(json.dumps({"devices": {"cuda bf16": profile}}))
    config.numa.bandwidth = {}
    monkeypatch.setattr(bandwidths, "bandwidths", lambda given: None)
    with pytest.raises(machine.UnknownRatesError, match="the host's bandwidth is unknown"):
        machine.rates(config)
