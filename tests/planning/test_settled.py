"""What a plan puts into a config, how the longest is found, and what is said where there is none."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest

from ldft.config import Config, Device, Goal, NumaStrategy, Precision, disagreements, run_id
from ldft.config.root import text_of
from ldft.errors import CombinationError, ConfigError
from ldft.memory.topology import Topology
from ldft.planning import machine, settled
from ldft.planning.iteration_time import Times
from ldft.planning.search import HOST, VRAM, Search
from ldft.runner import checks

TIMES = Times(forward_s=1, backward_s=2, step_s=4, update_s=0, exposed_s=0, arithmetic_s=3, launch_s=0, link_s=5)


def config_of(goal: Goal = Goal.fastest, tokens: int = 1024) -> Config:
    config = Config()
    config.plan.goal, config.launch.device, config.seq_len.tokens = goal, Device.cuda, tokens
    config.train.precision = Precision.bf16
    return config


def search_of(config: Config, **values: Any) -> Search:
    return Search(config, Topology(nodes=(), gpus={}, weights={}, weights_auto=None), None, host_limit=1, **values)  # type: ignore[arg-type]


def chosen_of(config: Config) -> Any:
    """A plan that recomputes one layer, in tiles."""
    return SimpleNamespace(
        run=SimpleNamespace(
            config=dataclasses.replace(
                config,
                asked={"of": "the plan"},
                checkpointing=dataclasses.replace(config.checkpointing, layers=1),
                kernels=dataclasses.replace(config.kernels, mlp_tiles=16),
            )
        )
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ConfigError]:
    """A machine whose rates are known, as long as this list is empty."""
    problems: list[ConfigError] = []

    def rates(config: Config) -> str:
        if problems:
            raise problems[0]
        return "rates"

    monkeypatch.setattr(machine, "rates", rates)
    monkeypatch.setattr(settled, "best", chosen_of)
    return problems


def test_the_plans_values_replace_the_configs_and_what_they_were_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "best", chosen_of)
    config = config_of()
    config.asked = {"launch.device": "auto"}
    settled.settle(config)
    assert (config.checkpointing.layers, config.kernels.mlp_tiles) == (1, 16)
    values = {"checkpointing.layers": "-1", "kernels.mlp_tiles": "null", "plan.goal": "fastest"}
    assert config.asked == {"launch.device": "auto", **values}
    settled.check(config)
    assert settled.overrides(config) == ["checkpointing.layers=1", "kernels.mlp_tiles=16"]
    # It is made once, and only where it is asked for.
    monkeypatch.setattr(settled, "best", lambda config: pytest.fail("again"))
    settled.settle(config)
    settled.settle(Config())
    config.asked["model.family"] = "the file's"
    assert not any("model" in text for text in settled.overrides(config))


def test_where_there_is_no_plan_the_reason_is_recorded_and_raised_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config) -> Any:
        raise ConfigError("plan.goal", "none: at all")

    monkeypatch.setattr(settled, "best", fail)
    config = config_of()
    settled.settle(config)
    assert config.asked == {"plan.goal": "plan.goal: none: at all"}
    with pytest.raises(ConfigError, match=r"^plan\.goal: none: at all$"):
        settled.check(config)
    settled.check(Config())


def test_changes_are_those_between_two_configs() -> None:
    config = config_of()
    chosen = chosen_of(config).run.config
    assert settled.changed(config, chosen) == [("checkpointing.layers", -1, 1), ("kernels.mlp_tiles", None, 16)]
    assert settled.changes(chosen, config) == ["checkpointing.layers=-1", "kernels.mlp_tiles=null"]
    assert text_of(0.25) == "0.25" and text_of(3.0) == "3"


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The longest length that fits, in tokens; a search's only plan is its length."""
    said = {"tokens": 0}

    def fits(self: Search) -> bool:
        assert not self.refusals and not self.invalid, "each length counts its own"
        self.refusals[VRAM] = 1
        return self.config.seq_len.tokens <= said["tokens"]

    monkeypatch.setattr(Search, "any_fits", fits)
    monkeypatch.setattr(Search, "within", lambda self: [self.config.seq_len.tokens, 0])
    return said


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 9, 100])
def test_the_longest_is_found_in_steps_of_4096_tokens(limit: dict[str, int], steps: int) -> None:
    limit["tokens"] = steps * 4096 + 4095
    searched = search_of(config_of(Goal.longest), refusals={VRAM: 1}, invalid={"a": 1})
    assert settled.longest(searched) == steps * 4096  # type: ignore[comparison-overlap]
    limit["tokens"] = steps * 4096
    assert settled.longest(searched) == steps * 4096  # type: ignore[comparison-overlap]


def test_there_may_be_no_longest_and_a_set_length_is_none(limit: dict[str, int]) -> None:
    limit["tokens"] = 4095
    config = config_of(Goal.longest)
    searched = search_of(config)
    assert settled.longest(searched) is None
    assert settled.nothing_fits(searched, ask="") == "nothing fits: every combination lacks VRAM"
    for key in ("seq_len", "seq_len.tokens"):
        config.plan.keep = ["offload", key]
        with pytest.raises(CombinationError, match=r"longest chooses seq_len, and seq_len\.tokens=1024 is set"):
            settled.longest(search_of(config))


def test_best_asks_for_the_goal_and_says_why_there_is_none(
    limit: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled, "started", search_of)
    found: list[Any] = ["the best"]
    monkeypatch.setattr(Search, "best", lambda self: found[0])
    limit["tokens"] = 8192
    assert settled.best(config_of()) == "the best"  # type: ignore[comparison-overlap]
    assert settled.best(config_of(Goal.longest)) == 8192  # type: ignore[comparison-overlap]
    found[0], limit["tokens"] = None, 0
    for goal, why in (
        (Goal.leanest, "no combination is possible: every value is set"),
        (Goal.longest, "nothing fits: every combination lacks VRAM; "),
    ):
        with pytest.raises(ConfigError, match=f"^plan.goal: {goal.name}: {why}"):
            settled.best(config_of(goal))


def test_what_is_said_where_nothing_fits() -> None:
    def said(refusals: dict[str, int], invalid: dict[str, int]) -> str:
        return settled.nothing_fits(search_of(config_of(), refusals=refusals, invalid=invalid))

    assert said({HOST: 1, VRAM: 2}, {"a": 9}).startswith("nothing fits: every combination lacks VRAM or host memory; ")
    assert said({HOST: 1}, {}).startswith("nothing fits: every combination lacks host memory; ")
    # Other reasons come first, the most frequent of each kind.
    assert said({HOST: 9, "x": 1, "y": 2}, {"a": 9}) == "no combination is possible: y"
    assert said({}, {"a": 1, "b": 2}) == "no combination is possible: b"
    assert said({}, {}) == "no combination is possible: every value is set"


def test_times_are_those_of_known_rates(measured: list[ConfigError], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(Goal.none)
    run: Any = SimpleNamespace(config=config)
    monkeypatch.setattr(settled, "predict", lambda run, rates: TIMES)
    assert settled.times(run) is TIMES
    assert settled.columns(run) == {
        "predicted_iteration_s": 7,
        "predicted_forward_s": 1,
        "predicted_backward_s": 2,
        "predicted_step_s": 4,
        "predicted_bound": "link",
    }
    config.launch.device = Device.cpu
    assert settled.times(run) is None and settled.columns(run) == {}
    config.launch.device = Device.cuda
    # A damaged profile stops what needs it: a plan, and bandwidths that were set.
    measured.append(ConfigError("a", "damaged"))
    assert settled.times(run) is None
    config.numa.bandwidth = {"node0": {"cpu": 1}}
    with pytest.raises(ConfigError, match="damaged"):
        settled.times(run)
    config.numa.bandwidth, config.plan.goal = {}, Goal.fastest
    with pytest.raises(ConfigError, match="damaged"):
        settled.times(run)
    measured[0] = machine.UnknownRatesError("a", "unknown")
    assert settled.times(run) is None


def test_auto_is_fastest_where_rates_are_known(measured: list[ConfigError]) -> None:
    config = config_of(Goal.auto)
    settled.settle(config)
    assert (config.plan.goal, config.checkpointing.layers) == (Goal.fastest, 1)
    assert config.asked["plan.goal"] == "auto" and settled.made(config)
    settled.check(config)
    assert checks.resolutions(config) == ["plan=fastest (auto): checkpointing.layers=1, kernels.mlp_tiles=16"]
    # It is the run that these values are, whoever chose them, and another host's same command agrees.
    by_hand = config_of(Goal.none)
    by_hand.checkpointing.layers, by_hand.kernels.mlp_tiles = 1, 16
    assert run_id(config) == run_id(by_hand)
    assert disagreements(config_of(Goal.auto), config) == []
    assert ("plan.goal", "fastest", "auto") in disagreements(config_of(Goal.fastest), config)


@pytest.mark.parametrize("case", ["sweep", "cpu", "machine", "numa", "rates", "hosts", "damaged"])
def test_auto_changes_nothing_where_a_plan_would_surprise(measured: list[ConfigError], case: str) -> None:
    config = config_of(Goal.auto)
    why = ""
    if case == "sweep":
        config.sweep.started_at, why = 1.0, "the cells of a sweep differ only in what it sweeps"
    elif case == "cpu":
        config.launch.device = Device.cpu
    elif case == "machine":
        config.machine.name, why = "h200", "on another machine the values count as they are"
    elif case == "numa":
        config.numa.strategy, why = NumaStrategy.cxl_aware, "numa is set, and a plan could leave nothing to place"
    elif case == "rates":
        measured.append(machine.UnknownRatesError("plan.goal", "none: the rates of cuda bf16 are unknown; measure"))
        why = "the rates of cuda bf16 are unknown; measure"
    elif case == "hosts":
        measured.append(machine.UnknownRatesError("machine.network_gb_per_s", "0: unknown"))
        why = "machine.network_gb_per_s: 0: unknown"
    else:
        measured.append(ConfigError("plan.goal", "none: the profile p cannot be read"))
        why = "the profile p cannot be read"
    settled.settle(config)
    assert (config.plan.goal, config.checkpointing.layers) == (Goal.none, -1)
    assert config.asked == {"plan.goal": "auto"} and not settled.made(config)
    settled.check(config)
    assert checks.resolutions(config) == ([f"plan=none (auto; {why})"] if why else [])
    settled.settle(config)  # once
    assert config.plan.goal is Goal.none


def test_auto_leaves_a_config_for_which_there_is_no_plan_to_the_usual_checks(
    measured: list[ConfigError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def best(config: Config) -> Any:
        raise ConfigError("plan.goal", "fastest: nothing fits")

    monkeypatch.setattr(settled, "best", best)
    config = config_of(Goal.auto)
    settled.settle(config)
    assert config.plan.goal is Goal.none and config.asked == {"plan.goal": "auto", "plan": "nothing fits"}
    settled.check(config)
    assert checks.resolutions(config) == ["plan=none (auto; nothing fits)"]
    assert run_id(config) == run_id(config_of(Goal.none)) and disagreements(config_of(Goal.auto), config) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda config: setattr(config.launch, "device", Device.cpu),
            "plan.tokens_per_update: 2048 needs a plan, and plan=auto makes none (on a CPU, expected times only compare plans); "
            "use plan=fastest, or train.micro_batch_size and train.gradient_accumulation_steps",
        ),
        (
            lambda config: setattr(config.launch, "num_hosts", 2),
            r"needs a plan, and plan=auto makes none \(machine.network_gb_per_s: 0: ",
        ),
        (lambda config: None, r"^plan.goal: fastest: nothing fits$"),
    ],
)
def test_auto_says_why_a_number_of_tokens_has_no_plan(
    measured: list[ConfigError], monkeypatch: pytest.MonkeyPatch, change: Any, says: str
) -> None:
    """The values as they are have another number, and that plan=none does not use it is not why."""

    def best(config: Config) -> Any:
        raise ConfigError("plan.goal", "fastest: nothing fits")

    monkeypatch.setattr(settled, "best", best)
    config = config_of(Goal.auto)
    config.launch.num_ranks, config.plan.tokens_per_update = 2, 2048
    change(config)
    settled.settle(config)
    config.validate()
    with pytest.raises(ConfigError, match=says if says[0] in "n^" else f"^{re.escape(says)}$"):
        settled.check(config)
