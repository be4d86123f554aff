"""MLflow: one run per record, in the experiment of MLFLOW_EXPERIMENT_NAME, else `ldft`. Needs ldft[mlflow]."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldft.errors import ResultsError
from multirun_analysis import style
from multirun_analysis.trackers.record import Record

# MLflow takes so many parameters in one call, and so many metrics.
_PARAMETERS, _METRICS = 100, 1000
_SQLITE = "sqlite:///"
_STATUS = {"ok": "FINISHED", "interrupted": "KILLED"}  # all others: FAILED


def log(record: Record, where: str) -> str:
    """Write a record to the tracking server or store at the URI `where`, in place of what was there of the same attempt.

    Returns the run's name and id. Raises ResultsError if the store cannot be used.
    """
    if "://" not in where or where.startswith("file:"):
        # Whoever names a folder wants it. MLflow keeps such stores for old users only, and refuses them without this.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # "Creating initial MLflow database tables..."
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _alone(where):
            return _log(record, where)
    except (MlflowException, SQLAlchemyError, requests.RequestException, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise ResultsError(f"MLflow at {where}: {said}; correct the URI, or start the server") from error


@contextmanager
def _alone(where: str) -> Iterator[None]:
    """One writer at a time of a database in a file: jobs of a sweep end together, and the first that comes makes its tables."""
    if not where.startswith(_SQLITE):
        yield
        return
    database = Path(where.removeprefix(_SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _log(record: Record, where: str) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(where)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "ldft"
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name, _artifacts(where))
    for old in client.search_runs([experiment], f"tags.`ldft.identity` = '{record.identity}'"):
        client.delete_run(old.info.run_id)
    tags = {"ldft.identity": record.identity, **{f"ldft.{key}": text for key, text in record.tags.items()}}
    begin, end = (int(time.timestamp() * 1000) for time in (record.started_at, record.ended_at))
    run = client.create_run(experiment, start_time=begin, run_name=record.name).info.run_id
    client.log_batch(run, tags=[RunTag(key, text) for key, text in tags.items()])
    parameters = [Param(key, str(value)) for key, value in record.config.items()]
    for start in range(0, len(parameters), _PARAMETERS):
        client.log_batch(run, params=parameters[start : start + _PARAMETERS])
    metrics = [Metric(key, value, end, 0) for key, value in record.metrics.items()]
    for key, values in record.series.items():
        for step, (value, time) in enumerate(zip(values, record.times, strict=False)):
            metrics.append(Metric(key, value, int(time.timestamp() * 1000), step))
    for start in range(0, len(metrics), _METRICS):
        client.log_batch(run, metrics=metrics[start : start + _METRICS])
    for path in record.files:
        client.log_artifact(run, str(path))
    with tempfile.TemporaryDirectory() as folder:
        for key, figure in record.figures.items():
            style.save(figure, Path(folder), key)
        if record.figures:
            client.log_artifacts(run, folder, "figures")
    client.set_terminated(run, _STATUS.get(record.status, "FAILED"), end)
    return f"{record.name} ({run})"


def _artifacts(where: str) -> str | None:
    """Where a new experiment's files go: beside a database in a file, else where the server says. MLflow would take the current
    folder for such a database."""
    if not where.startswith(_SQLITE):
        return None
    return (Path(where.removeprefix(_SQLITE)).absolute().parent / "mlartifacts").as_uri()
