"""Where a run's results go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec

from ldft.errors import ConfigError

TRACKERS = ("tensorboard", "mlflow", "wandb")
"""Experiment trackers, by the name of their package, which is also the name of ldft's extra."""


@dataclass(kw_only=True, slots=True)
class ResultsConfig:
    dir: str = "results"
    """Folder that receives one folder per run."""

    log_to: list[str] = field(default_factory=list)
    """Experiment trackers that get each finished row: tensorboard (<results.dir>/tensorboard), mlflow (MLFLOW_TRACKING_URI, else
    <results.dir>/mlflow.db) and wandb (WANDB_PROJECT, else ldft). They are called after the row is written."""

    def validate(self) -> None:
        """Raises ConfigError."""
        for name, count in Counter(self.log_to).items():
            if name not in TRACKERS:
                raise ConfigError(
                    "results.log_to", f"'{name}' is no tracker that ldft knows; use {', '.join(TRACKERS)}"
                )
            if count > 1:
                raise ConfigError("results.log_to", f"names {name} {count} times; once is enough")
            if told := missing(name):
                raise ConfigError("results.log_to", told)


def missing(tracker: str) -> str:
    """The line about a tracker whose package is not installed; empty if it is."""
    absent = [name for name in _PACKAGES.get(tracker, (tracker,)) if find_spec(name) is None]
    return f"{', '.join(absent)} not installed; pip install 'ldft[{tracker}]'" if absent else ""


# MLflow keeps runs in a database by these two, which its client alone (mlflow-skinny) does not install.
_PACKAGES = {"mlflow": ("mlflow", "sqlalchemy", "alembic")}
