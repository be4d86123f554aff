"""The plan of a sweep: which cells, in what order. It lies in results/sweeps/ for onlookers; what is done, the rows tell."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import random
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from ldft.config import Config, from_dict, run_id
from ldft.errors import ConfigError
from ldft.results import attempt
from ldft.runner import checks
from ldft.runner.measured import tokens_per_iteration
from ldft.terminal import length

Choices = dict[str, list[str]]
"""Override texts by key: one for a value that is the same in all cells, several for one that is swept."""


@dataclass(slots=True)
class Cell:
    """A cell of the plan; plain data, as it lies in the plan's file."""

    run_id: str
    label: str
    """What tells it apart on screen: model, length, policy, and whatever else is swept."""
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
    """By run_id; not in the file."""

    @property
    def path(self) -> Path:
        """Relative to the results folder."""
        return Path("sweeps") / f"{self.name}-{_short([cell.run_id for cell in self.cells])}.json"

    def save(self, results_dir: Path) -> None:
        """Leave the plan for onlookers."""
        target = results_dir / self.path
        target.parent.mkdir(exist_ok=True)
        attempt.write_json(target, {key: value for key, value in asdict(self).items() if key != "configs"})


def load_plans(results_dir: Path) -> list[Plan]:
    """The plans of a results folder, the newest first. One that another version of ldft wrote may be left out."""
    plans = []
    for path in (results_dir / "sweeps").glob("*.json"):
        values = json.loads(path.read_text())
        with contextlib.suppress(TypeError, KeyError):
            plans.append(Plan(**values | {"cells": [Cell(**one) for one in values["cells"]]}))
    return sorted(plans, key=lambda plan: plan.started_at, reverse=True)


def _short(names: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:6]


def grid(fixed: Choices, points: list[Choices]) -> list[list[str]]:
    """The override lists of all cells: the product of `fixed`, times the product of each point.

    What is in both is the point's business, unless `fixed` says it: the command line wins over a file.
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
    """Compose every cell, draw the budget, repeat, and put them in order: pass by pass, each ascending in length.

    Short cells come first, since they tell most for the least and the back-stop learns from them; a pass over all cells comes
    before the next, so that drift of the machine hits all cells alike. elsewhere: the cells may run on other machines than this.
    Raises what composing raises, and ConfigError.
    """
    first = from_dict(compose(cells[0]))
    first.sweep.started_at = started_at
    first.sweep.validate()
    if first.repeat != 1:
        raise ConfigError("repeat", "a sweep counts it by itself; use sweep.repeats for the number of repetitions")
    budget = first.sweep.budget
    if 0 < budget < len(cells):  # before composing, which takes a tenth of a second a cell
        drawn = random.Random(first.sweep.budget_seed).sample(range(len(cells)), budget)
        cells = [cells[index] for index in sorted(drawn)]
    found: dict[str, tuple[Config, list[str]]] = {}
    settings: dict[str, set[str]] = {}
    for overrides in cells:
        config = from_dict(compose(overrides))
        if elsewhere:
            _refuse_auto(config)
        checks.resolve(config)
        for key in ("sweep", "rerun", "results", "repeat"):
            settings.setdefault(key, set()).add(str(getattr(config, key)))
            if len(settings[key]) > 1:
                raise ConfigError(key, "it is the same for all cells of a sweep; start several sweeps instead")
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
    """What depends on the machine must be said where cells run on others than this: their names are made here."""
    for key, value, choices in (
        ("launch.device", config.launch.device.name, "cuda or cpu"),
        ("train.precision", config.train.precision.name, "bf16, fp16 or fp32"),
    ):
        if value == "auto":
            raise ConfigError(
                key, f"auto: a launcher runs the cells, where there may be other devices than here; use {choices}"
            )


def _label(config: Config, overrides: list[str], swept: set[str], repeats: int) -> str:
    shown = ("model", "seq_len", "seq_len.tokens", "numa")
    others = [text.lstrip("+") for text in overrides if text.split("=")[0].lstrip("+") in swept.difference(shown)]
    words = [config.model.name, length(config.seq_len.tokens), config.numa.name, *others]
    return " ".join(words + ([f"#{config.repeat}"] if repeats > 1 else []))
