"""What other memory, machines and settings would change about a plan. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ldft.config import THIS, Config, Device, Goal
from ldft.errors import ConfigError
from ldft.planning import candidates
from ldft.planning.search import Plan, Search
from ldft.preflight.resolved import device_gib
from ldft.terminal import length

GIB = 2**30
_MORE_HOST_GIB = (64, 256, 1024)
_LORA_RANK = 16


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change, and its effect."""

    what: str
    effect: str
    tokens_per_s: float


def remedies(searched: Search, plan: Plan | None) -> list[Remedy]:
    """The changes that make it fit, or that change its speed by more than 1%, fastest first."""
    now = 1 / plan.seconds_per_token if plan else 0.0
    if plan:  # at the length that was found
        searched = dataclasses.replace(
            searched, config=dataclasses.replace(searched.config, seq_len=plan.run.config.seq_len)
        )
    found = []
    for what, changed in _changes(searched, plan is None):
        best, why = _best(changed)
        speed = 1 / best.seconds_per_token if best else 0.0
        if best is None and plan is None:
            continue
        if plan is None:
            effect = f"{speed:.0f} tokens/s"
        elif best is None:
            effect = why
        else:
            effect = f"{speed:.0f} tokens/s ({speed / now - 1:+.0%})"
        if plan is None or abs(speed / now - 1) > 0.01:
            found.append(Remedy(what, effect, speed))
    return sorted(found, key=lambda one: -one.tokens_per_s)


def _best(searched: Search) -> tuple[Plan | None, str]:
    """The best plan, or None and what is said of it."""
    config = searched.config
    try:
        if best := next(iter(searched.within()), None):
            return best, ""
    except ConfigError as error:
        return None, f"not possible: {_reason(error)}"
    wanted = config.plan.goal is Goal.longest or config.plan.tokens_per_update
    why = candidates.why_not_shared(config, config.launch.num_ranks) if wanted else None
    return None, f"nothing fits{f' ({_reason(why)})' if why else ''}"


def _reason(error: ConfigError) -> str:
    """Without what to do: the change is a proposal of ldft's."""
    return str(error).partition(";")[0]


def _changes(searched: Search, all_of_them: bool) -> Iterator[tuple[str, Search]]:
    config = searched.config
    for more in _MORE_HOST_GIB if all_of_them else _MORE_HOST_GIB[:1]:
        yield f"{more} GiB more of host memory", _fresh(searched, _host(config, searched.host_limit / GIB + more))
    if config.launch.device is Device.cuda:
        hosts = config.launch.num_hosts
        step = math.lcm(hosts, config.launch.sequence_parallel)
        ranks = config.launch.num_ranks + step
        several = dataclasses.replace(config, launch=dataclasses.replace(config.launch, num_ranks=ranks))
        rates = searched.rates
        if ranks == 2 and hosts == 1:  # with one GPU, there is no rate between GPUs
            link = rates.host.link_h2d if config.machine.name == THIS else 1e9 * config.machine.peer_gb_per_s
            rates = dataclasses.replace(rates, peers=link)
        yield (
            ("one more GPU" if step == hosts else f"{step // hosts} more GPUs")
            + (" on each host" if hosts > 1 else "")
            + (" (same tokens on each)" if not all_of_them else ""),
            _fresh(searched, several, rates=rates),
        )
        if (size := device_gib(config)) is not None and not all_of_them:
            yield "half of the GPU's memory", _fresh(searched, _vram(config, size / 2))
    for part in (2, 4, 16) if all_of_them else (2,):
        tokens = config.seq_len.tokens // part
        if tokens and not config.plan.tokens_per_update:
            shorter = dataclasses.replace(config, seq_len=dataclasses.replace(config.seq_len, tokens=tokens))
            yield f"seq_len={length(tokens)}", _fresh(searched, shorter)
    if all_of_them:
        if not config.lora.rank:
            lora = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=_LORA_RANK))
            yield f"lora=r{_LORA_RANK}", _fresh(searched, lora)
        if config.optimizer.name == "adamw":
            lion = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="lion"))
            yield "optimizer=lion", _fresh(searched, lion)


def _vram(config: Config, gib: float) -> Config:
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, vram_gib=gib))


def _host(config: Config, gib: float) -> Config:
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, capacity_gib=gib))


def _fresh(searched: Search, config: Config, **changes: object) -> Search:
    """A search for another config."""
    return dataclasses.replace(searched, config=config, host_limit=0, refusals={}, invalid={}, _bases={}, **changes)  # type: ignore[arg-type]
