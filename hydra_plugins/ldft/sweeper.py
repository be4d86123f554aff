"""ldft's Hydra sweeper plugin. Plans a sweep (sweep/plan.py) and runs it (sweep/loop.py), with the chosen launcher."""

from __future__ import annotations

import time
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, flag_override

from hydra_plugins.ldft.slurm_launcher import SlurmLauncher


class LdftSweeper(Sweeper):
    """params: as for Hydra's own sweeper, hydra.sweeper.params: the grid, swept values by key.

    points: sets of overrides that belong together, each one or more cells; they are combined with the whole grid.
    """

    def __init__(self, params: dict[str, Any], points: list[dict[str, Any]]) -> None:
        self._params = params
        self._points = points
        self._context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def _load(self, overrides: list[str]) -> DictConfig:
        assert self._context is not None
        tree: DictConfig = self._context.config_loader.load_sweep_config(self._config, overrides).copy()
        with flag_override(tree, ["struct", "readonly"], [False, False]):
            del tree["hydra"]
        return tree

    def _compose(self, overrides: list[str]) -> DictConfig:
        from ldft.cli.overrides import keys
        from ldft.config import Goal

        tree = self._composer(overrides)
        tree._set_flag(["struct", "readonly"], [False, False])
        if tree["plan"]["goal"] == Goal.auto:
            tree["plan"]["goal"] = Goal.none  # cells differ only in what is swept
        if tree["plan"]["goal"] != Goal.none:
            tree["plan"]["keep"] += keys(overrides)
        return tree

    def _choices(self, texts: list[str]) -> tuple[dict[str, list[str]], set[str]]:
        """Override strings by key, and the keys with several."""
        assert self._context is not None
        choices, swept = {}, set()
        for override in OverridesParser.create(config_loader=self._context.config_loader).parse_overrides(texts):
            key = override.get_key_element()
            if not override.is_sweep_override():
                choices[key.lstrip("+")] = [override.input_line or key]
                continue
            if not override.is_discrete_sweep():
                raise HydraException(f"{override.input_line}: a grid needs single values; use choice(), range() or a,b")
            choices[key.lstrip("+")] = self._values(key, override)
            swept.add(key.lstrip("+"))
        return choices, swept

    @staticmethod
    def _values(key: str, override: Override) -> list[str]:
        """The override strings of a swept key. Raises ConfigError if there are none."""
        from ldft.cli.composition import groups
        from ldft.errors import ConfigError

        typed, group = (override.input_line or key).partition("=")[2], key.lstrip("+")
        try:
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        except ValueError as error:  # range(1,10,0)
            raise ConfigError(group, f"{typed}: {error}; name at least one value") from None
        if values:
            return values
        if not typed.startswith("glob("):
            raise ConfigError(group, f"{typed} contains no value; name at least one")
        if group not in groups():
            raise ConfigError(group, f"{typed}: glob() finds options of a group; list the values, as in {key}=a,b")
        raise ConfigError(group, f"{typed} matches no option; use one of {', '.join(groups()[group])}")

    def sweep(self, arguments: list[str]) -> None:
        """Plan all cells, then run them. Pass the exit code directly to ldft.cli, since Hydra does not return it."""
        from ldft.cli import command, many
        from ldft.cli.overrides import refuse_detach
        from ldft.sweep import loop, plan

        assert self._context is not None
        self._composer = many.Composer(self._load)

        named = [f"{key}={value}" for key, value in self._params.items()]
        fixed, swept = self._choices([*named, *arguments])
        points = []
        for point in self._points:
            choices, several = self._choices([f"{key}={value}" for key, value in point.items()])
            points.append(choices)
            swept |= set(choices) | several
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=self._task, config=self._config
        )
        # In place of Hydra's basic launcher, which also runs jobs in this process: it would compose each cell again, from the
        # yaml files as they are by then, and it swallows errors.
        here = isinstance(launcher, BasicLauncher)
        planned = plan.make(plan.grid(fixed, points), self._compose, swept, time.time(), elsewhere=not here)
        if isinstance(launcher, SlurmLauncher):
            command.exit_codes.append(loop.Sweep(planned, queue=launcher).run())
            return
        refuse_detach()
        elsewhere = None if here else lambda cells: launcher.launch(cells, initial_job_idx=0)
        command.exit_codes.append(loop.Sweep(planned, elsewhere).run())
