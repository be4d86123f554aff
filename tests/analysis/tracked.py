"""Runs trackers, and reads what MLflow holds afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

TIMES = [9.0, 9.0, 1.0, 1.5, 1.25]
LOSS = [3.0, 2.5, 2.25, float("nan"), 2.0]
# A name that no tracker takes as it is, and a line that breaks a table.
ODD = "a/b: <c> | 'd'\n👍"


Log = Callable[..., subprocess.CompletedProcess[str]]


def of_its_own(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ldft.results log` in a process, as W&B needs it, which reads its variables once."""
    return subprocess.run(
        [sys.executable, "-m", "ldft.results", "log", *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


def mlflow_runs(where: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(where)
    experiment = client.get_experiment_by_name("ldft")
    return client, client.search_runs([experiment.experiment_id])
