"""The plan of a sweep: its cells and their order. Stored in results/sweeps/ for ldft.status; progress is in the rows."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import random
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from ldft import batch
from ldft.config import Config, Goal, from_dict, run_id
from ldft.errors import ConfigError
from ldft.results import attempt
from ldft.runner import checks
from ldft.runner.measured import tokens_per_iteration
from ldft.terminal import length

Choices = dict[str, list[str]]
"""Override strings by key: one if the value is the same in all cells, several if it is swept."""


@dataclass(slots=True)
class Cell:
    """A cell of the plan: plain data, as stored in the plan's file."""

    run_id: str
    label: str
    """Its name on screen: model, sequence length, policy, and the other swept keys."""
    model: str
    tokens: int
    repeat: int
    tokens_per_iteration: int
    overrides: list[str]


@dataclass(slots=True)
class Plan:
    name: str
    started_at: float
    """Seconds since the epoch."""
    host: str
    cells: list[Cell]
    configs: dict[str, Config] = field(default_factory=dict, repr=False)
    """Config by run_id; not stored in the file."""

    @property
    def path(self) -> Path:
        """Relative to the results folder."""
        return Path("sweeps") / f"{self.name}-{_short([cell.run_id for cell in self.cells])}.json"

    def save(self, results_dir: Path) -> None:
        """Write the plan's file, for ldft.status."""
        target = results_dir / self.path
        target.parent.mkdir(exist_ok=True)
        attempt.write_json(target, {key: value for key, value in asdict(self).items() if key != "configs"})


def load_plans(results_dir: Path) -> list[Plan]:
    """The plans in a results folder, newest first. Damaged ones are named on stderr; those written by another version of ldft may
    be left out."""
    plans = []
    for path in (results_dir / "sweeps").glob("*.json"):
        try:
            values = json.loads(path.read_text())
        except ValueError as error:  # no JSON, or no UTF-8
            print(f"ldft: skipped unreadable {path}: {error}", file=sys.stderr)
            continue
        with contextlib.suppress(TypeError, KeyError):
            plans.append(Plan(**values | {"cells": [Cell(**one) for one in values["cells"]]}))
    return sorted(plans, key=lambda plan: plan.started_at, reverse=True)


def _short(names: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:6]


def grid(fixed: Choices, points: list[Choices]) -> list[list[str]]:
    """The override lists of all cells: the product of `fixed` times the product of each point.

    A key in both is taken from `fixed`: the command line overrides a file.
    """
    cells = []
    for point in points or [{}]:
        both = fixed | {key: texts for key, texts in point.items() if key not in fixed}
        cells += [list(texts) for texts in itertools.product(*both.values())]
    return cells


def make(
    cells: list[list[str]],
    compose: Callable[[list[str]], DictConfig],
    swept: set[str],
    started_at: float,
    *,
    elsewhere: bool = False,
) -> Plan:
    """Compose every cell, draw the budget, repeat, and order the cells: pass by pass, each by ascending sequence length.

    Short cells come first, since they give most information for least time and the back-stop learns from them; each pass covers
    all cells before the next begins, so that drift of the machine affects all cells alike. elsewhere: cells may run on other
    machines. Raises ConfigError, and whatever composing raises.
    """
    first = from_dict(compose(cells[0]))
    first.sweep.started_at = started_at
    first.sweep.validate()
    if first.repeat != 1:
        raise ConfigError("repeat", "set by the sweep; use sweep.repeats for the number of repetitions")
    budget = first.sweep.budget
    if 0 < budget < len(cells):  # before composing, which takes up to a tenth of a second per cell
        drawn = random.Random(first.sweep.budget_seed).sample(range(len(cells)), budget)
        cells = [cells[index] for index in sorted(drawn)]
    found: dict[str, tuple[Config, list[str]]] = {}
    settings: dict[str, set[str]] = {}
    for overrides in cells:
        config = from_dict(compose(overrides))
        if elsewhere:
            _refuse_auto(config)
        elif config.launch.num_hosts > 1 and batch.given():
            raise ConfigError(
                "launch.num_hosts",
                f"{config.launch.num_hosts}: a sweep over several hosts needs SLURM; start each cell by a command of its own",
            )
        checks.resolve(config)
        for key in ("sweep", "rerun", "results", "repeat"):
            settings.setdefault(key, set()).add(str(getattr(config, key)))
            if len(settings[key]) > 1:
                raise ConfigError(key, "must be the same for all cells of a sweep; start several sweeps instead")
        found.setdefault(run_id(config), (config, overrides))
    name = first.sweep.name or f"sweep-{_short(found)}"
    result = Plan(name, started_at, socket.gethostname(), [])
    for repeat in range(1, first.sweep.repeats + 1):
        for one in sorted(found, key=lambda one: found[one][0].seq_len.tokens):
            config, overrides = copy.deepcopy(found[one])
            own = [f"repeat={repeat}", f"sweep.name={json.dumps(name)}", f"sweep.started_at={started_at!r}"]
            config.repeat, config.sweep.name, config.sweep.started_at = repeat, name, started_at
            result.configs[run_id(config)] = config
            result.cells.append(
                Cell(
                    run_id=run_id(config),
                    label=_label(config, overrides, swept, first.sweep.repeats),
                    model=config.model.name,
                    tokens=config.seq_len.tokens,
                    repeat=repeat,
                    tokens_per_iteration=tokens_per_iteration(config),
                    overrides=overrides + own,
                )
            )
    return result


def _refuse_auto(config: Config) -> None:
    """Refuse machine-dependent values (auto, plans) if cells run on other machines: their run_ids are computed here."""
    if config.plan.goal is not Goal.none:
        raise ConfigError(
            "plan.goal",
            f"{config.plan.goal.name}: the launcher may run cells on other machines than the plan is made for; "
            "take the values that python -m ldft.plan gives",
        )
    for key, value, choices in (
        ("launch.device", config.launch.device.name, "cuda or cpu"),
        ("train.precision", config.train.precision.name, "bf16, fp16 or fp32"),
    ):
        if value == "auto":
            raise ConfigError(key, f"auto: the launcher may run cells on machines with other devices; use {choices}")


def _label(config: Config, overrides: list[str], swept: set[str], repeats: int) -> str:
    shown = ("model", "seq_len", "seq_len.tokens", "numa")
    others = [text.lstrip("+") for text in overrides if text.split("=")[0].lstrip("+") in swept.difference(shown)]
    words = [config.model.name, length(config.seq_len.tokens), config.numa.name, *others]
    return " ".join(words + ([f"#{config.repeat}"] if repeats > 1 else []))
