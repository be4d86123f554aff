"""The command line: Hydra composes the config, the runner runs it, and user errors are printed as one line."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldft import batch, closed_pipe
from ldft.cli import composition, overrides
from ldft.config import Goal, from_dict
from ldft.environment import CONF_DIR
from ldft.errors import ConfigError, InternalError, LdftError, ResultsError
from ldft.results.history import History
from ldft.runner import hosts, meeting, parent
from ldft.runner.summary import summary
from ldft.sweep import cell

composition.register()

exit_codes: list[int] = []


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _task(tree: DictConfig) -> None:
    """Run one cell. Never raises: Hydra would print extra lines and end the sweep's loop."""
    try:
        exit_codes.append(_cell(tree))
    except Exception as error:
        exit_codes.append(_report(error))


def _cell(tree: DictConfig) -> int:
    config = from_dict(tree)
    if config.plan.goal is not Goal.none:
        config.plan.keep += overrides.keys(HydraConfig.get().overrides.task)
    if not config.sweep.started_at:
        overrides.refuse_detach()
        overrides.refuse_launcher(HydraConfig.get().overrides.hydra)
    if config.dry_run:
        from ldft.runner import dry_run

        print(dry_run.describe(config), flush=True)
        return 0
    if (given := batch.given()) and given.number:
        config.launch.validate()
        hosts.check(config)
        return meeting.join(given, config)
    if config.launch.num_hosts > 1 and batch.host_number():
        return 0  # SLURM's task on the first host runs the cell
    if config.sweep.started_at:
        # A sweep cell that a launcher started on some machine; the sweep reads the result from the cell's row.
        cell.run(config, History(parent.prepare(config)))
        return 0
    config.sweep.validate()
    outcome = parent.run(config)
    print(summary(outcome, config), flush=True)
    if outcome.status == "invalid":
        _say(outcome.row["error_message"])
    return outcome.exit_code


def _say(line: str) -> None:
    print(f"ldft: {line}", file=sys.stderr, flush=True)


def _keep_traceback() -> Path:
    """Write the current exception's traceback to this folder or, if it is not writable, to the temporary folder; return the
    path."""
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        if os.access(folder, os.W_OK):
            break
    log = folder / "ldft-internal-error.log"
    log.write_text(traceback.format_exc())
    return log


def _overrides() -> list[str]:
    return [argument for argument in sys.argv[1:] if not argument.startswith("-")]


def _options_first(arguments: list[str]) -> list[str]:
    """The same arguments with all overrides in one place, as Hydra's parser requires. Raises ConfigError where that parser would
    print its usage."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError("command line", f"{message}; see python -m ldft --help")

    parser = get_args_parser()
    parser.error = refuse
    known, further = parser.parse_known_intermixed_args(arguments)
    if unknown := [argument for argument in further if argument.startswith("-")]:
        refuse(f"there is no option {unknown[0]}")
    overrides.check_options(vars(known))
    given = [*known.overrides, *further]
    return [argument for argument in arguments if argument not in given] + given


def _at_home(override: str) -> str:
    """Expand the home folder in key=~/folder: shells do not expand it there, and Hydra's grammar does not accept `~/`."""
    key, equals, value = override.partition("=")
    return f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else override


def _report(error: Exception) -> int:
    """Print an error as one line and return the exit code. Exceptions that are not ldft's own are bugs: their traceback is
    saved."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        _say(composition.one_line(error, _overrides()))
        return 2
    if isinstance(error, yaml.YAMLError):
        _say(composition.bad_yaml(error))
        return 2
    if isinstance(error, OSError) and (line := composition.bad_folder(error, _overrides())):
        _say(line)
        return 2
    if isinstance(error, LdftError):
        _say(str(error))
        return 1 if isinstance(error, ResultsError) else 2
    log = error.log if isinstance(error, InternalError) else _keep_traceback()
    _say(f"internal error: this is a bug in ldft; traceback in {log}")
    return 1


@closed_pipe.work_on
def main() -> int:
    """Entry point of `ldft` and `python -m ldft`; returns the exit code."""
    # Makes Hydra raise composition errors instead of printing them itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    exit_codes.clear()
    if "--version" in sys.argv[1:]:  # Hydra's parser would print Hydra's version
        print(f"ldft {metadata.version('ldft')}")
        return 0
    try:
        overrides.take_detach(sys.argv)
        sys.argv = [sys.argv[0], *map(_at_home, _options_first(sys.argv[1:]))]
        overrides.check(_overrides())
        _task()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _report(error)
    return max(exit_codes, default=0)
