"""The best plan: that of trying everything, never one that is refused, and never worse on a better machine."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldft import environment
from ldft.config import THIS, Config, Goal, from_dict, to_dict
from ldft.errors import ConfigError
from ldft.planning import candidates, iteration_time, machine, settled
from ldft.planning.search import LEANEST_WITHIN, Plan, Search
from ldft.preflight import assumed_machine, device_estimate, fit, gpu_share, room
from ldft.preflight.resolved import Resolved, complete, settle
from ldft.preflight.selection import select
from ldft.runner import checks
from tests.conftest import IN_CI, compose

MODEL = ("model=llama3_1b", "model.num_layers=4", "launch.device=cuda", "machine=h200", "train.precision=bf16")
NUMBER = 300 if IN_CI else 40


def config_of(*overrides: str) -> Config:
    """Resolved, its plan not made."""
    config = compose(*MODEL, *overrides)
    config.plan.goal = Goal.none
    checks.resolve(config)
    config.plan.goal = Goal.fastest
    return config


@contextmanager
def searched(config: Config) -> Iterator[Search]:
    with assumed_machine.assumed(config):
        yield settled.started(config)


def drawn(rng: random.Random, base: Config) -> Config:
    """A random machine, and a random model of four layers."""
    config = copy.deepcopy(base)
    config.model.hidden_size = rng.choice([512, 2048, 4096])
    config.model.intermediate_size = config.model.hidden_size * rng.choice([2, 4])
    config.model.tie_word_embeddings = rng.random() < 0.5
    config.seq_len.tokens = rng.choice([4096, 16384, 65536, 262144])
    config.machine.vram_gib = rng.choice([8, 12, 16, 24, 48, 80])
    config.machine.host_gib = rng.choice([8, 16, 32, 64, 256])
    config.machine.link_gb_per_s = rng.choice([16, 64, 450])
    config.machine.host_gb_per_s = rng.choice([40, 300])
    config.launch.num_ranks = rng.choice([1, 1, 2])
    config.plan.goal = rng.choice([Goal.fastest, Goal.leanest])
    if rng.random() < 0.3:
        config.plan.tokens_per_update = config.seq_len.tokens * config.launch.num_ranks * rng.choice([2, 4])
    config.numa.bandwidth = assumed_machine.bandwidth(config.machine)
    return config


def everything(config: Config) -> list[Plan]:
    """Every plan that fits, without bound, cache or early refusal."""
    found = []
    host = min(fit.available(config).bytes, room.host_memory(config))
    for choice in candidates.choices(config):
        try:
            run = settle(select(candidates.applied(config, choice), topology=assumed_machine.topology(config)))
            whole = complete(run, settled=True)
        except ConfigError:
            continue
        plans = []
        for one in (whole, *with_larger_shares(whole)):
            try:
                fit.examine(one)
            except ConfigError:
                continue
            peak = sum(device_estimate.peak_of(one.estimate.moments).values())
            times = iteration_time.predict(one, machine.rates(config))
            plan = Plan(choice, one, times, one.estimate.host_bytes, peak)
            if room.device_room(one, config.machine.vram_gib, 0.02) >= 0 and plan.host_bytes * 1.02 <= host:
                plans.append(plan)
        # Of one combination, the share that takes least time.
        found += sorted(plans, key=lambda plan: plan.seconds_per_token)[:1]
    return found


def with_larger_shares(run: Resolved) -> Iterator[Resolved]:
    if run.overlap_step and run.config.offload.gpu_share is None:
        for elements in gpu_share.larger(run):
            part = gpu_share.part(dataclasses.replace(run, gpu_share=elements))
            offload = dataclasses.replace(run.config.offload, gpu_share=part)
            config = dataclasses.replace(run.config, offload=offload)
            try:
                yield complete(settle(select(config, topology=run.topology)), settled=True)
            except ConfigError:
                continue


def test_a_larger_share_is_tried_where_the_default_leaves_too_much_in_host_memory() -> None:
    """The default hides the update, but keeps 8% of the GPU's memory free, and so too much of the state on the host."""
    config = config_of("model.hidden_size=4096", "model.intermediate_size=16384", "seq_len=64k")
    config.machine.vram_gib, config.machine.host_gib, config.machine.link_gb_per_s = 26, 13, 64
    config.machine.host_gb_per_s = 300
    config.numa.bandwidth = assumed_machine.bandwidth(config.machine)
    with searched(config) as one:
        best, plans = one.best(), everything(config)
    assert best is not None and best.run.config.offload.gpu_share
    assert best.seconds_per_token == pytest.approx(min(plan.seconds_per_token for plan in plans), rel=1e-12)
    assert all(plan.run.config.offload.gpu_share for plan in plans), "no default fits"


def test_impossible_combinations_are_counted_by_reason() -> None:
    """The most frequent reason is said where nothing is possible."""
    with searched(config_of("optimizer.overlap_step=true")) as one:
        valid = len(list(one.plans()))
        every = len(list(candidates.choices(candidates.placed(one.config, one.topology))))
    gathered, on_device = sorted(one.invalid)
    assert "the device updates the weights" in on_device and "ZeRO-2 gathers all weights" in gathered
    assert one.invalid == {on_device: valid, gathered: valid} and every == 3 * valid


def test_a_search_finds_what_trying_everything_finds() -> None:
    rng, base, without = random.Random(4), config_of(), 0
    for _ in range(NUMBER):
        config = drawn(rng, base)
        with searched(config) as one:
            best, plans = one.best(), everything(config)
        if not plans:
            assert best is None
            without += 1
            continue
        assert best is not None
        fastest = min(plan.seconds_per_token for plan in plans)
        if config.plan.goal is Goal.fastest:
            assert best.seconds_per_token == pytest.approx(fastest, rel=1e-12)
        else:
            near = [plan.host_bytes for plan in plans if plan.seconds_per_token <= fastest * LEANEST_WITHIN]
            assert best.host_bytes == min(near) and best.seconds_per_token <= fastest * LEANEST_WITHIN
    assert 0 < without < NUMBER / 2, "some machines are too small, most are not"


def test_a_plan_passes_the_check_of_every_run() -> None:
    rng, base = random.Random(5), config_of()
    for _ in range(NUMBER):
        config = drawn(rng, base)
        with assumed_machine.assumed(config):
            settled.settle(config)
        if config.asked[settled.DONE] != config.plan.goal.name:
            continue
        stored = from_dict(to_dict(config) | {"asked": {}})  # as a rank or a later command reads it
        stored.asked = config.asked
        with assumed_machine.assumed(stored):
            fit.examine(checks.check_machine(stored))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("machine.vram_gib", (16, 24, 40, 80, 140)),
        ("machine.host_gib", (24, 32, 64, 128)),
        ("machine.link_gb_per_s", (8, 32, 64, 450)),
        ("machine.host_gb_per_s", (50, 200, 600)),
    ],
)
@pytest.mark.parametrize("length", ["8k", "64k"])
def test_a_better_machine_is_never_slower(key: str, values: tuple[int, ...], length: str) -> None:
    speeds = []
    for value in values:
        small = ["machine.vram_gib=32", "machine.host_gib=64", f"{key}={value}", f"seq_len={length}"]
        with searched(config_of("model.num_layers=8", *small)) as one:
            best = one.best()
        speeds.append(1 / best.seconds_per_token if best else 0.0)
    assert speeds == sorted(speeds) and speeds[-1] > 0


def test_the_leanest_plan_needs_less_host_memory_where_that_is_possible() -> None:
    with searched(config_of("model.num_layers=16", "seq_len=32k", "machine.vram_gib=24")) as one:
        fastest = one.best()
        one.config.plan.goal = Goal.leanest
        leanest = one.best()
    assert fastest and leanest
    assert leanest.host_bytes < fastest.host_bytes
    assert leanest.seconds_per_token <= LEANEST_WITHIN * fastest.seconds_per_token


def test_the_longest_plan_fits_and_a_longer_one_does_not() -> None:
    config = config_of("machine.vram_gib=16", "machine.host_gib=24")
    config.plan.goal = Goal.longest
    with searched(config) as one:
        longest = settled.longest(one)
        assert longest and longest.run.config.seq_len.tokens % 4096 == 0
        config.seq_len.tokens = longest.run.config.seq_len.tokens + 4096
        config.plan.goal = Goal.fastest
        assert settled.started(config).best() is None


def test_micro_batches_and_accumulation_give_the_tokens_of_an_update() -> None:
    config = config_of("seq_len=8k", "plan=fastest", "plan.tokens_per_update=131072", "launch.num_ranks=2")
    config.plan.keep = ["launch.sequence_parallel"]
    pairs = {(c.micro_batch_size, c.gradient_accumulation_steps) for c in candidates.choices(config)}
    assert pairs == {(1, 8), (2, 4), (4, 2), (8, 1)}
    config.plan.keep.append("train.micro_batch_size")
    assert {c.micro_batch_size for c in candidates.choices(config)} == {1}
    config.plan.tokens_per_update = 100_000
    with pytest.raises(ConfigError, match=r"100000 is no multiple of 16384.*use e.g. 98304"):
        list(candidates.choices(config))
    config.plan.tokens_per_update = 131072
    config.plan.keep = ["train.micro_batch_size", "train.gradient_accumulation_steps"]
    with pytest.raises(ConfigError, match="leave one of them out"):
        list(candidates.choices(config))


def test_with_several_nodes_roles_are_placed_by_the_cost_model() -> None:
    config = config_of("model.num_layers=16", "machine.host=two_nodes_cxl", "machine.vram_gib=16", "seq_len=32k")
    with searched(config) as one:
        best = one.best()
        assert best and best.run.config.numa.name == "optimal"
        placed = complete(best.run, settled=True)
    found = placed.placements[0]
    assert all(found[role].kind != "default" for role in placed.estimate.roles)
    assert any(2 in (found[role].shares() or {}) for role in placed.estimate.roles), "the expander is used"
    config.plan.keep = ["numa"]
    with searched(config) as one:
        best = one.best()
        assert best and best.run.config.numa.name == "default"


def test_a_measured_profile_counts_for_its_gpu_and_driver_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: dict[str, Any] = {
        "products_tflops_per_s": 700.0,
        "attention_tflops_per_s": {"128": {"8192": [500.0, 400.0]}},
    }
    rates |= {
        "memory_gb_per_s": 4000.0,
        "peer_gb_per_s": None,
        "launches_beside": 0.9,
        "layer_host_s": {"fetched": [3e-3, 4e-3, 2e-3], "resident": [1e-3, 2e-3, 1e-3]},
        "gpu": "NVIDIA H200",
        "driver": "1",
    }
    profile = {"bandwidth": {"node0": {"cpu": 120, "h2d": 50, "d2h": 50}}, "devices": {"cuda bf16": rates}}
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "ldft" / "hardware" / f"{socket.gethostname()}.json"
    path.parent.mkdir(parents=True)
    config = compose("model=llama3_1b", "launch.device=cuda", "plan=fastest")
    assert config.machine.name == THIS
    monkeypatch.setattr(environment, "gpus", lambda: ("NVIDIA H200",))
    monkeypatch.setattr(environment, "driver", lambda: "1")
    with pytest.raises(
        machine.UnknownRatesError, match="the rates of cuda bf16 are unknown; measure this machine once"
    ):
        machine.rates(config)
    path.write_text(json.dumps(profile))
    found = machine.rates(config)
    assert (found.measured, found.products, found.attention_of(128, 8192)) == (True, 7e14, (5e14, 4e14))
    assert (found.fetched.forward, found.fetched.again, found.resident.backward) == (3e-3, 2e-3, 2e-3)
    monkeypatch.setattr(environment, "driver", lambda: "2")
    with pytest.raises(machine.UnknownRatesError, match="measured with driver 1, here is 2"):
        machine.rates(config)
    monkeypatch.setattr(environment, "driver", lambda: "1")
    del rates["launches_beside"]
    path.write_text(json.dumps(profile))
    with pytest.raises(ConfigError, match="is damaged"):
        machine.rates(config)
    config.plan.goal = Goal.none
    assert settled.columns(SimpleNamespace(config=config)) == {}, "a run without a plan can do without it"  # type: ignore[arg-type]
    config.plan.goal = Goal.fastest
    path.write_text("{")
    with pytest.raises(ConfigError, match="measure again"):
        machine.rates(config)


def test_replacing_fields_shares_nothing_that_changes() -> None:
    config = config_of()
    before = to_dict(config)
    with searched(config) as one:
        best = one.best()
    assert best and to_dict(best.run.config) != before and to_dict(config) == before
