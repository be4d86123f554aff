"""Hand a finished row to experiment trackers (results.log_to), by a process of its own: none of them is loaded here."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from ldft.config import Config

# A server that does not answer holds up a sweep once, for this long.
_LIMIT_S = 120
# Trackers import torch or other large packages, and must not use the run's GPUs.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": ""}
_LOGGED, _NOT_LOGGED = "ldft: logged to ", "ldft: not logged to "
# Trackers that did not answer in time; this process tries them no more.
_silent: set[str] = set()


def log(config: Config, attempt_dir: Path) -> list[str]:
    """Log the row in `attempt_dir`. Returns a line per tracker that has it; says on stderr which does not, and why.

    The row is safe by now, so no failure here is the run's.
    """
    wanted = [name for name in config.results.log_to if name not in _silent]
    if not wanted:
        return []
    command = _command(wanted, attempt_dir)
    try:
        # In a session of its own: Ctrl-C ends the run, and its row says so, also in the tracker.
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | _ENVIRONMENT,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            timeout=_LIMIT_S,
            check=False,
        )
        out, said, in_time = done.stdout, done.stderr, True
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        reason = f"its process ended with exit code {done.returncode}" + (f" ({last})" if last else "")
    except subprocess.TimeoutExpired as ended:
        out, said, reason = ended.stdout or b"", ended.stderr or b"", f"no answer within {_LIMIT_S} s"
        in_time = False
    lines = out.decode(errors="replace").splitlines()
    written = [line for line in lines if line.startswith(_LOGGED)]
    failed = dict(
        _named(line, _NOT_LOGGED) for line in said.decode(errors="replace").splitlines() if _NOT_LOGGED in line
    )
    have = {_named(line, _LOGGED)[0] for line in written}
    for name in wanted:
        if name in have:
            continue
        if name not in failed and not in_time:
            _silent.add(name)
        later = shlex.join(["python", *_command([name], attempt_dir)])
        print(
            f"ldft: warning: the row is written, but not logged to {name}: {failed.get(name, reason)}; to log it later: {later}",
            file=sys.stderr,
            flush=True,
        )
    return written


def _named(line: str, before: str) -> tuple[str, str]:
    """The tracker in a line, and what is said of it."""
    name, _, text = line.removeprefix(before).partition(": ")
    return name, text


def _command(names: list[str], attempt_dir: Path) -> list[str]:
    targets = [word for name in names for word in (f"--{name}", _target(name, attempt_dir.parents[1]))]
    return ["-m", "ldft.results", "log", *targets, str(attempt_dir)]


def _target(name: str, results_dir: Path) -> str:
    """Where a tracker keeps its runs: as its own environment variable says, else in the results folder."""
    if name == "mlflow":
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results_dir / 'mlflow.db'}"
    if name == "wandb":
        return os.environ.get("WANDB_PROJECT") or "ldft"
    return str(results_dir / name)
