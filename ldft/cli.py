"""The command line: Hydra composes the config, the runner runs it, errors of a user's making become one line."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldft import composition, runner
from ldft.config import from_dict
from ldft.environment import CONF_DIR
from ldft.errors import InternalError, LdftError

composition.register()

_exit_codes: list[int] = []


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _task(tree: DictConfig) -> None:
    """One cell. Returns and never raises for a failed run: Hydra's loop would end there, silently."""
    config = from_dict(tree)
    if config.dry_run:
        from ldft import dry_run

        print(dry_run.describe(config), flush=True)
        return
    outcome = runner.run(config)
    print(runner.summary(outcome, config), flush=True)
    if outcome.status == "invalid":
        _say(outcome.row["error_message"])
    _exit_codes.append(outcome.exit_code)


def _say(line: str) -> None:
    print(f"ldft: {line}", file=sys.stderr, flush=True)


def _keep_traceback() -> Path:
    """Write the traceback of the current exception, here or where that is not allowed, in the folder for temporary files."""
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        if os.access(folder, os.W_OK):
            break
    log = folder / "ldft-internal-error.log"
    log.write_text(traceback.format_exc())
    return log


def main() -> int:
    """Entry point of `ldft` and `python -m ldft`; returns the exit code."""
    # Composition errors are to reach us instead of Hydra's own printer.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _exit_codes.clear()
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        composition.check_overrides(overrides)
        _task()
    except (HydraException, OmegaConfBaseException) as error:
        _say(composition.one_line(error, overrides))
        return 2
    except LdftError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except InternalError as error:
        _say(f"internal error: this is a bug in ldft; traceback in {error.log}")
        return 1
    except Exception:
        _say(f"internal error: this is a bug in ldft; traceback in {_keep_traceback()}")
        return 1
    return max(_exit_codes, default=0)
