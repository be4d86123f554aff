"""Hand a finished row to experiment trackers (results.log_to), by a process of its own: none of them is loaded here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ldft.config import Config

# A tracking server that does not answer holds up a sweep for no longer than this.
_LIMIT_S = 300
# Trackers import torch or other large packages, and must not use the run's GPUs.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": ""}


def log(config: Config, attempt_dir: Path) -> list[str]:
    """Log the row in `attempt_dir`. Returns a line per tracker that has it; says on stderr if one does not.

    The row is safe by now, so no failure here is the run's.
    """
    if not config.results.log_to:
        return []
    targets = [word for name in config.results.log_to for word in (f"--{name}", _target(name, attempt_dir.parents[1]))]
    command = ["-m", "ldft.results", "log", *targets, str(attempt_dir)]
    try:
        # In a session of its own: Ctrl-C ends the run, and its row says so, also in the tracker.
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | _ENVIRONMENT,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_LIMIT_S} s"
        written: list[str] = []
    else:
        written = [line for line in done.stdout.splitlines() if line.startswith("ldft: logged to ")]
        if not done.returncode:
            return written
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}").removeprefix("ldft: ")
    print(
        f"ldft: warning: the row is written, but not logged: {reason}; to log it later: python {' '.join(command)}",
        file=sys.stderr,
        flush=True,
    )
    return written


def _target(name: str, results_dir: Path) -> str:
    """Where a tracker keeps its runs: as its own environment variable says, else in the results folder."""
    if name == "mlflow":
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results_dir / 'mlflow.db'}"
    if name == "wandb":
        return os.environ.get("WANDB_PROJECT") or "ldft"
    return str(results_dir / name)
