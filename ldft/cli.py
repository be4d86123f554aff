"""The command line: Hydra composes the config, the runner runs it, errors of a user's making become one line."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldft import runner
from ldft.config import Config, from_dict
from ldft.environment import CONF_DIR
from ldft.errors import LdftError

ConfigStore.instance().store(name="schema", node=Config)

_exit_codes: list[int] = []


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _task(tree: DictConfig) -> None:
    """One cell. Returns and never raises for a failed run: Hydra's loop would end there, silently."""
    config = from_dict(tree)
    outcome = runner.run(config)
    print(runner.summary(outcome, config), flush=True)
    _exit_codes.append(outcome.exit_code)


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
        print(f"ldft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        log = Path("ldft-internal-error.log").absolute()
        log.write_text(traceback.format_exc())
        print(f"ldft: internal error: this is a bug in ldft; traceback in {log}", file=sys.stderr)
        return 1
    return max(_exit_codes, default=0)
