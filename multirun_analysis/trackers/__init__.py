"""Finished rows in the experiment trackers where people already look. Nothing here runs while a run is measured.

python -m ldft.results log --mlflow http://tracking:5000 results/
python -m ldft results.log_to=[tensorboard,mlflow]                  each run, once its row is written
"""

from __future__ import annotations

from collections.abc import Callable

from multirun_analysis.trackers import mlflow, tensorboard, wandb
from multirun_analysis.trackers.record import Record, records

TRACKERS: dict[str, Callable[[Record, str], str]] = {
    "tensorboard": tensorboard.log,
    "mlflow": mlflow.log,
    "wandb": wandb.log,
}
"""Tracker -> the function that writes a record to a folder, URI or project and returns where it is. Each raises ResultsError."""

__all__ = ["TRACKERS", "Record", "records"]
