"""The parts of the search by themselves: what it refuses, in which order it tries, when it ends, what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from ldft.config import Config, Device, Goal, OffloadDevice
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.errors import ConfigError
from ldft.memory.cost_model import Bandwidths
from ldft.memory.policy import PlacementError
from ldft.memory.topology import Node, Topology
from ldft.planning import iteration_time
from ldft.planning.candidates import OFFLOADS, Choice
from ldft.planning.iteration_time import Times
from ldft.planning.rates import from_datasheet
from ldft.planning.search import HOST, VRAM, Plan, Search, best_of
from ldft.preflight import device_estimate, fit, host_estimate, mlp_tiles, resolved, room, selection

TIMES = Times(forward_s=1, backward_s=2, step_s=3, update_s=2.5, exposed_s=0, arithmetic_s=4, launch_s=0, link_s=0)
CHOICE = Choice(OFFLOADS["full"], CheckpointingMode.cpu, -1, 1, KeepAttention.none, None, 1, 1)
ONE_NODE = Topology(
    nodes=(Node(id=0, cpus=(0,), total_bytes=1, distances={0: 10}),),
    gpus={},
    weights={},
    weights_auto=None,
    allowed=(0,),
)
RATES = from_datasheet(
    peak=1e12,
    device_memory=1e12,
    host=Bandwidths(cpu={0: 1e9}, h2d={0: 1e9}, d2h={0: 1e9}, link_h2d=1e9, link_d2h=1e9),
)


def config_of(goal: Goal = Goal.fastest) -> Config:
    """Two layers; 10 tokens, so that seconds of an iteration are ten times those of a token."""
    config = Config()
    config.launch.device, config.plan.goal, config.seq_len.tokens = Device.cpu, goal, 10
    return config


def search_of(config: Config, **values: Any) -> Search:
    return Search(config, ONE_NODE, RATES, **({"host_limit": 10**12} | values))


def plan_of(seconds: float, arithmetic: float = 0.0, host: int = 0, device: int = 0) -> Plan:
    times = dataclasses.replace(TIMES, forward_s=10 * seconds, backward_s=0, step_s=0, arithmetic_s=arithmetic)
    return Plan(CHOICE, SimpleNamespace(config=config_of()), times, host, device)  # type: ignore[arg-type]


def test_seconds_of_a_token_count_all_tokens_of_all_ranks() -> None:
    config = config_of()
    config.train.micro_batch_size, config.train.gradient_accumulation_steps, config.launch.num_ranks = 2, 3, 5
    plan = Plan(CHOICE, SimpleNamespace(config=config), TIMES, 0, 0)  # type: ignore[arg-type]
    assert plan.seconds_per_token == 6 / (10 * 2 * 3 * 5)


def test_memory_of_the_host_is_what_the_machine_has_or_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, have, limit in ((100, 80, 80), (100, 120, 100), (100, 0, 100)):
        monkeypatch.setattr(fit, "available", lambda config, free=free: SimpleNamespace(bytes=free))
        monkeypatch.setattr(room, "host_memory", lambda config, have=have: have)
        assert search_of(config_of(), host_limit=0).host_limit == limit
        assert search_of(config_of(), host_limit=7).host_limit == 7


class Listed(Search):
    """A search among given plans: (least seconds of a token, plan or None); `small` says which fit."""

    listed: list[tuple[float, Plan | None]]
    small: Callable[[Plan], bool]
    made: list[float]

    def plans(self) -> Iterator[tuple[float, Callable[[], Plan | None]]]:
        def make(least: float, plan: Plan | None) -> Plan | None:
            self.made.append(least)
            return plan

        for least, plan in self.listed:
            yield least, lambda least=least, plan=plan: make(least, plan)  # type: ignore[misc]

    def fits(self, plan: Plan) -> Any:
        return plan if self.small(plan) else None


def among(
    *listed: tuple[float, Plan | None], goal: Goal = Goal.fastest, small: Callable[[Plan], bool] = bool
) -> Listed:
    found = Listed(config_of(goal), ONE_NODE, RATES, host_limit=1)
    found.listed, found.small, found.made = list(listed), small, []
    return found


def test_the_search_ends_where_no_later_plan_can_be_faster() -> None:
    first, faster, slower = plan_of(8), plan_of(4), plan_of(5)
    one = among((1, first), (2, None), (3, faster), (4, slower), (4.5, plan_of(1)))
    assert one.within() == [faster] and one.made == [1, 2, 3, 4], "what needs as long at least is tried, too"
    assert one.best() is faster
    assert among().best() is None and among((1, None)).within() == []
    assert among((1, first), (3, faster), small=lambda plan: plan is first).within() == [first]


def test_plans_within_a_part_of_the_best_in_the_order_of_what_they_need() -> None:
    best, near, late = plan_of(4), plan_of(6), plan_of(7)
    one = among((1, late), (2, near), (3, best), (6, plan_of(6.5)), (6.1, plan_of(6.1)))
    assert one.within(1.5) == [best, near] and one.made == [1, 2, 3, 6]
    # Plans of the same time: least arithmetic, then host memory, then device memory.
    ties = [plan_of(4, 1, 1, 2), plan_of(4, 2, 0, 0), plan_of(4, 1, 2, 1), plan_of(4, 1, 1, 1)]
    assert among(*((1, plan) for plan in ties)).within() == [ties[3], ties[0], ties[2], ties[1]]


def test_the_leanest_is_that_with_least_host_memory_of_those_within_a_twentieth() -> None:
    plans = [plan_of(100, host=9), plan_of(101, host=3), plan_of(105, host=3), plan_of(106, host=1)]
    assert best_of(plans, Goal.leanest) is plans[1] and best_of(plans, Goal.fastest) is plans[0]
    plans[2] = plan_of(105, host=2)
    assert best_of(plans, Goal.leanest) is plans[2], "a twentieth counts as within"
    listed = tuple((plan.seconds_per_token, plan) for plan in plans)
    assert among(*listed, goal=Goal.leanest).best() is plans[2] and among(*listed).best() is plans[0]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the estimates say of the only combination; a test may change it. Two ranks need 300 bytes of host memory."""
    said: dict[str, Any] = {"room": [0, 0], "gib": 1.0, "error": None}

    def settle(run: Any) -> Any:
        if said["error"]:
            raise said["error"]
        return run

    monkeypatch.setattr(resolved, "settle", settle)
    monkeypatch.setattr(resolved, "device_gib", lambda config: said["gib"])
    monkeypatch.setattr(room, "device_room", lambda run, gib, spare: said["room"].pop(0))
    monkeypatch.setattr(device_estimate, "moments", lambda run: {"loss": {"weights": 3, "inputs": 4}, "step": {"x": 5}})
    monkeypatch.setattr(host_estimate, "host_bytes", lambda run: {"momentum": 60, "variance": 40})
    monkeypatch.setattr(host_estimate, "other_bytes", lambda run, peak: {"process": 43, "device": sum(peak.values())})
    monkeypatch.setattr(iteration_time, "predict", lambda run, rates: TIMES)
    return said


def test_a_combination_is_refused_for_the_memory_it_lacks(settled: dict[str, Any]) -> None:
    config = config_of()
    config.launch.device, config.launch.num_ranks = Device.cuda, 2
    run: Any = SimpleNamespace(config=config, overlap_step=False)
    one = search_of(config, host_limit=306)  # 2% of the 300 stay free
    plan = one._plan(CHOICE, run)
    assert plan and (plan.host_bytes, plan.device_bytes, plan.times) == (300, 7, TIMES) and not one.refusals
    settled["room"] = [-1]
    assert one._plan(CHOICE, run) is None and one.refusals == {VRAM: 1}
    settled["room"] = [0, -1]  # what settles adds to device memory
    assert one._plan(CHOICE, run) is None and one.refusals == {VRAM: 2}
    settled["room"], one.host_limit = [0, 0], 305
    assert one._plan(CHOICE, run) is None and one.refusals == {VRAM: 2, HOST: 1}
    settled["room"], settled["error"] = [0, 0], ConfigError("a", "b")
    assert one._plan(CHOICE, run) is None and one.refusals["a: b"] == 1
    # On a CPU, and on a GPU of unknown size, there is no room to look at.
    settled["room"], settled["error"], one.host_limit, settled["gib"] = [], None, 306, None
    assert one._plan(CHOICE, run)
    settled["gib"], config.launch.device = 1.0, Device.cpu
    assert one._plan(CHOICE, run)


def test_a_fiftieth_of_device_memory_stays_free(settled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []

    def device_room(run: Any, gib: float, spare: float) -> int:
        asked.append((gib, spare))
        return 0

    monkeypatch.setattr(room, "device_room", device_room)
    config = config_of()
    config.launch.device = Device.cuda
    assert search_of(config)._plan(CHOICE, SimpleNamespace(config=config, overlap_step=False))  # type: ignore[arg-type]
    assert asked == [(1.0, 0.02)] * 2


def test_the_least_time_is_the_gpus_work_and_what_no_update_can_hide(settled: dict[str, Any]) -> None:
    run: Any = dataclasses.make_dataclass("Run", ["config", "overlap_step"])(config_of(), True)
    assert search_of(config_of())._least(run) == (4 + 3 - 2.5) / 10


def test_deepspeeds_settings_are_built_once_for_combinations_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Config] = []
    made = dataclasses.make_dataclass("Run", ["config", "mlp_tiles"])

    def select(config: Config, *, topology: Topology) -> Any:
        built.append(config)
        if config.train.micro_batch_size == 7:
            raise ConfigError("a", "b")
        return made(config, 0)

    monkeypatch.setattr(selection, "select", select)
    monkeypatch.setattr(mlp_tiles, "choose", lambda config: config.kernels.mlp_tiles)
    one, config = search_of(config_of()), config_of()
    config.kernels.mlp_tiles = 2

    def after(**changes: Any) -> int:
        """How many are built in all when these keys have changed."""
        for key, value in changes.items():
            section, _, name = key.partition("__")
            setattr(getattr(config, section), name, value)
        run = one._select(config)
        assert run.config is config and run.mlp_tiles == config.kernels.mlp_tiles
        return len(built)

    assert [after(), after(), after(kernels__mlp_tiles=4)] == [1, 1, 1]
    assert after(checkpointing__layers=1) == 2, "of two layers one is recomputed"
    assert after(checkpointing__layers=0) == 2 and after(checkpointing__layers=2) == 2
    assert after(train__micro_batch_size=2) == 3 and after(train__gradient_accumulation_steps=2) == 4
    assert after(checkpointing__every=2) == 5 and after(checkpointing__keep_attention=KeepAttention.host) == 6
    assert after(offload__stage=2) == 7 and after(offload__parameters=OffloadDevice.none) == 8
    assert after(offload__optimizer=OffloadDevice.none) == 9
    config.train.micro_batch_size = 7
    for _ in range(2):
        with pytest.raises(ConfigError):
            one._select(config)
    assert len(built) == 10, "an error is remembered, too"


def test_what_cannot_be_combined_is_counted_and_the_rest_comes_in_the_order_of_its_least_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of()
    config.plan.keep = ["checkpointing.layers", "checkpointing.keep_attention", "kernels.mlp_tiles"]

    def select(self: Search, config: Config) -> Any:
        if config.offload.stage == 2:
            raise ConfigError("offload", "no")
        return config

    least: Mapping[CheckpointingMode, float] = {
        CheckpointingMode.cpu: 2.0,
        CheckpointingMode.gpu: 3.0,
        CheckpointingMode.none: 1.0,
    }
    monkeypatch.setattr(Search, "_select", select)
    monkeypatch.setattr(Search, "_least", lambda self, config: least[config.checkpointing.mode])
    monkeypatch.setattr(Search, "_plan", lambda self, choice, run: (choice.mode, run.checkpointing.mode))
    one = search_of(config)
    found = [(seconds, make()) for seconds, make in one.plans()]
    assert [seconds for seconds, _ in found] == [1, 1, 2, 2, 3, 3]
    assert all(least[asked] == seconds and asked is run for seconds, (asked, run) in found)  # type: ignore[misc]
    assert one.invalid == {"offload: no": 3}


def test_the_check_of_every_run_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    one, plan = search_of(config_of()), plan_of(1)
    monkeypatch.setattr(resolved, "complete", lambda run, settled: ("whole", settled))
    monkeypatch.setattr(fit, "examine", lambda run: None)
    found: Any = one.fits(plan)
    assert found == ("whole", True) and not one.refusals

    def refuse(run: Any) -> None:
        raise PlacementError("numa", "no node")

    monkeypatch.setattr(fit, "examine", refuse)
    assert one.fits(plan) is None and one.fits(plan) is None and one.refusals == {"numa: no node": 2}


def test_whether_any_fits_is_asked_of_the_leanest_until_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[OffloadDevice] = []
    plan = plan_of(1)

    def make(self: Search, choice: Choice, run: Config) -> Plan | None:
        tried.append(run.offload.optimizer)
        return plan if run.offload.stage else None

    def select(self: Search, config: Config) -> Config:
        if config.checkpointing.mode is not CheckpointingMode.none:
            raise ConfigError("a", "b")
        return config

    monkeypatch.setattr(Search, "_select", select)
    monkeypatch.setattr(Search, "_plan", make)
    monkeypatch.setattr(Search, "fits", lambda self, plan: None if len(tried) < 3 else plan)
    assert search_of(config_of()).any_fits()
    assert tried == [OffloadDevice.none, OffloadDevice.cpu, OffloadDevice.cpu]
    monkeypatch.setattr(Search, "fits", lambda self, plan: None)
    assert not search_of(config_of()).any_fits()
