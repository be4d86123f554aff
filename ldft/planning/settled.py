"""Puts a plan's values into a config, before the run's identity is computed. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ldft.config import THIS, Config, Device, Goal, NumaConfig
from ldft.config.root import flatten, missing_plan, text_of
from ldft.errors import CombinationError, ConfigError
from ldft.planning import machine, search
from ldft.planning.iteration_time import Times, predict
from ldft.planning.search import Plan, Search
from ldft.preflight import assumed_machine
from ldft.preflight.resolved import Resolved

DONE = "plan.goal"
"""Key of config.asked that says that the plan is made."""
WHY_NONE = "plan"
"""Key of config.asked under which it is said why plan=auto found no plan."""
# Lengths are searched in these steps, tokens; GPU kernels and tiles like multiples.
_LENGTH_STEP = 4096
_ASK = "; python -m ldft.plan with the same settings says what would"


def settle(config: Config) -> None:
    """Replace values that were left at their default by those of the best plan, and record them in `asked`; nothing if no plan is
    asked for, or if it is made. Where there is none, `asked` says why, so that the run becomes a row; check() raises it. With
    plan=auto, the run goes on without, unless plan.tokens_per_update asks for one."""
    asked, tokens = config.plan.goal, config.plan.tokens_per_update
    if asked is Goal.none or DONE in config.asked:
        return
    if asked is Goal.auto and (why := declined(config)):
        if tokens:
            none = ConfigError(
                "plan.tokens_per_update",
                f"{tokens} needs a plan, and plan=auto makes none ({why}); use plan=fastest, or train.micro_batch_size and "
                "train.gradient_accumulation_steps",
            )
            config.asked[DONE] = str(none)
        else:
            config.plan.goal, config.asked[DONE] = Goal.none, asked.name
        return
    if asked is Goal.auto:
        config.plan.goal = Goal.fastest
    try:
        config.validate()
        plan = best(config)
    except ConfigError as error:
        if asked is Goal.auto and not tokens:
            config.plan.goal, config.asked[DONE] = Goal.none, asked.name
            config.asked[WHY_NONE] = str(error).removeprefix(f"{DONE}: {Goal.fastest.name}: ")
        else:
            config.asked[DONE] = str(error)
        return
    chosen = plan.run.config
    config.asked |= {key: text_of(before) for key, before, _ in changed(config, chosen)}
    config.asked[DONE] = asked.name
    for field in dataclasses.fields(config):
        setattr(config, field.name, getattr(chosen, field.name) if field.name != "asked" else config.asked)


def declined(config: Config) -> str:
    """Why plan=auto leaves this config as it is; empty if it makes a plan."""
    if why := declined_everywhere(config):
        return why
    try:
        machine.rates(config)
    except ConfigError as error:
        return str(error).removeprefix(f"{DONE}: {config.plan.goal.name}: ")
    return ""


def declined_everywhere(config: Config) -> str:
    """The same, as far as it does not depend on what was measured on this machine."""
    if config.sweep.started_at:
        return "the cells of a sweep differ only in what it sweeps"
    if config.launch.device is Device.cpu:
        return "on a CPU, expected times only compare plans"
    if config.machine.name != THIS:
        return "on another machine the values count as they are"
    if config.numa != NumaConfig(bandwidth=config.numa.bandwidth):
        return "numa is set, and a plan could leave nothing to place"
    if config.launch.num_hosts > 1 and not config.machine.network_gb_per_s:
        return str(machine.unknown_network())
    return ""


def made(config: Config) -> bool:
    """Whether a plan chose values."""
    return config.plan.goal is not Goal.none and DONE in config.asked and not missing_plan(config.asked)


def changed(config: Config, chosen: Config) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, with both."""
    before, after = flatten(config), flatten(chosen)
    return [(key, before[key], value) for key, value in after.items() if before[key] != value and key != "asked"]


def check(config: Config) -> None:
    """Raise ConfigError if a plan was asked for and there is none."""
    key, _, problem = missing_plan(config.asked).partition(": ")
    if problem:
        raise ConfigError(key, problem)


def best(config: Config) -> Plan:
    """The best plan by config.plan.goal. Raises ConfigError if its times cannot be predicted or if none fits."""
    searched = started(config)
    found = longest(searched) if config.plan.goal is Goal.longest else searched.best()
    if found is None:
        raise ConfigError("plan.goal", f"{config.plan.goal.name}: {nothing_fits(searched)}")
    return found


def started(config: Config) -> Search:
    """The search for a config whose device, precision and model are resolved."""
    return Search(config, assumed_machine.topology(config), machine.rates(config))


def longest(searched: Search) -> Plan | None:
    """The fastest plan at the longest sequence that fits. Raises CombinationError if seq_len was set."""
    config = searched.config
    step = math.lcm(_LENGTH_STEP, config.launch.sequence_parallel)
    if set(config.plan.keep) & {"seq_len", "seq_len.tokens"}:
        raise CombinationError(
            "plan.goal",
            f"longest chooses seq_len, and seq_len.tokens={config.seq_len.tokens} is set; leave one of them out",
        )

    def at(steps: int) -> Search:
        tokens = dataclasses.replace(config.seq_len, tokens=steps * step)
        return dataclasses.replace(
            searched, config=dataclasses.replace(config, seq_len=tokens), refusals={}, invalid={}, _bases={}
        )

    few, many = 0, 1
    while (tried := at(many)).any_fits():
        few, many = many, 2 * many
    if not few:  # for nothing_fits()
        searched.refusals.update(tried.refusals)
        searched.invalid.update(tried.invalid)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if at(middle).any_fits() else (few, middle)
    return next(iter(at(few).within()), None) if few else None


def nothing_fits(searched: Search, ask: str = _ASK) -> str:
    """Why there is no plan. ask: what to do where memory is too little."""
    refusals = sorted(searched.refusals, key=lambda name: -searched.refusals[name])
    memory = [name for name in refusals if name in search.MEMORIES]
    others = [name for name in refusals if name not in memory]
    if memory and not others:
        return f"nothing fits: every combination lacks {' or '.join(memory)}{ask}"
    others += sorted(searched.invalid, key=lambda text: -searched.invalid[text])
    return f"no combination is possible: {others[0] if others else 'every value is set'}"


def times(run: Resolved) -> Times | None:
    """Expected times of a run; None if the machine's rates are unknown, or on a CPU, where the formulas only compare plans."""
    if run.config.launch.device is Device.cpu:
        return None
    try:
        return predict(run, machine.rates(run.config))
    except machine.UnknownRatesError:
        return None
    except ConfigError:
        if run.config.plan.goal is not Goal.none or run.config.numa.bandwidth:
            raise
        return None  # a damaged profile stops only what cannot do without one


def columns(run: Resolved) -> dict[str, Any]:
    """The row's columns: expected times, where the machine's rates are known."""
    found = times(run)
    if found is None:
        return {}
    return {
        "predicted_iteration_s": found.iteration_s,
        "predicted_forward_s": found.forward_s,
        "predicted_backward_s": found.backward_s,
        "predicted_step_s": found.step_s,
        "predicted_bound": found.bound,
    }


def overrides(config: Config) -> list[str]:
    """What a plan changed, as on a command line."""
    left = {"launch.device", "train.precision", DONE}
    values = {key: value for key, value in flatten(config).items() if key in config.asked and key not in left}
    return [f"{key}={text_of(value)}" for key, value in values.items() if not key.startswith("model.")]


def changes(config: Config, chosen: Config) -> list[str]:
    """What differs between a config and a plan's, as on a command line."""
    return [f"{key}={text_of(value)}" for key, _, value in changed(config, chosen)]
