"""The command line: Hydra composes the config, the runner runs it, errors of a user's making become one line."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldft import cell, runner
from ldft.config import Config, from_dict
from ldft.environment import CONF_DIR
from ldft.errors import LdftError, ResultsError
from ldft.history import History


@dataclass
class _SweeperConfig:
    """Hydra's way to a plugin is its class by name."""

    _target_: str = "hydra_plugins.ldft.sweeper.LdftSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)


ConfigStore.instance().store(name="schema", node=Config)
ConfigStore.instance().store(group="hydra/sweeper", name="ldft", node=_SweeperConfig)

exit_codes: list[int] = []


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _task(tree: DictConfig) -> None:
    """One cell. Returns and never raises for a failed run: Hydra's loop would end there, silently."""
    config = from_dict(tree)
    try:
        if config.sweep.started_at:
            # A cell of a sweep, on a machine where a launcher put it; the sweep reads what became of it from its row.
            cell.run(config, History(runner.prepare(config)))
            return
        config.sweep.validate()
        outcome = runner.run(config)
    except LdftError as error:
        exit_codes.append(_refuse(error))
        return
    print(runner.summary(outcome, config), flush=True)
    exit_codes.append(outcome.exit_code)


def _refuse(error: LdftError) -> int:
    """One line; the exit code."""
    print(f"ldft: {error}", file=sys.stderr)
    return 1 if isinstance(error, ResultsError) else 2


def main() -> int:
    """Entry point of `ldft` and `python -m ldft`; returns the exit code."""
    # Composition errors are to reach us instead of Hydra's own printer.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _task()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"ldft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except LdftError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130
    except Exception:
        log = Path("ldft-internal-error.log").absolute()
        log.write_text(traceback.format_exc())
        print(f"ldft: internal error: this is a bug in ldft; traceback in {log}", file=sys.stderr)
        return 1
    return max(exit_codes, default=0)
