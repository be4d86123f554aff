"""MLflow: one run per record, in the experiment of MLFLOW_EXPERIMENT_NAME, else `ldft`. Needs ldft[mlflow]."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldft.errors import ResultsError
from multirun_analysis import style
from multirun_analysis.trackers.record import Record

# MLflow takes so many parameters in one call, and so many metrics.
_PARAMETERS, _METRICS = 100, 1000
_LONGEST_NAME = 250
_SQLITE = "sqlite:///"
_STATUS = {"ok": "FINISHED", "interrupted": "KILLED"}  # all others: FAILED


def log(record: Record, where: str) -> str:
    """Write a record to the tracking server or store at the URI `where`, in place of what was there of the same attempt.

    Returns the run's name and id. Raises ResultsError if the store cannot be used.
    """
    where = _store(where)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):  # "Creating initial MLflow database tables..."
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _alone(where):
            return _log(record, where)
    except (MlflowException, SQLAlchemyError, requests.RequestException, OSError) as error:
        said = " ".join(re.sub(r"<[^>]*>", " ", str(error)).split())[:300]
        raise ResultsError(f"MLflow at {where}: {said}; correct the URI, or start the server") from error


def _store(where: str) -> str:
    """The URI, of a folder with its home folder. Raises ResultsError for what MLflow would take for another kind of store."""
    if re.match(r"[\w.-]+:\d+(/|$)", where):
        raise ResultsError(
            f"MLflow at {where}: a server's address begins with http:// or https://, as in http://{where}"
        )
    if where.startswith("sqlite:") and not re.match(r"sqlite:///.+", where):
        raise ResultsError(
            f"MLflow at {where}: a database in a file has three slashes, as in sqlite:///results/mlflow.db"
        )
    if "://" not in where and where != "databricks":
        return str(Path(where).expanduser().absolute())
    return where


# MLflow's own settings, unless they are set already.
_ENVIRONMENT = {
    # Whoever names a folder wants it. MLflow keeps such stores for old users only, and refuses them without this.
    "MLFLOW_ALLOW_FILE_STORE": "true",
    # A server that is down is said to be down in seconds, not in minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


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
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(where)
    except ModuleNotFoundError as error:  # the driver of the database that the URI names
        raise ResultsError(f"MLflow at {where}: {error}; install it, or use another store") from error
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "ldft"
    known = client.get_experiment_by_name(name)
    if known and known.lifecycle_stage != "active":
        raise ResultsError(
            f"MLflow at {where}: the experiment {name} is deleted; restore it, or set MLFLOW_EXPERIMENT_NAME"
        )
    experiment = known.experiment_id if known else client.create_experiment(name, _artifacts(where))
    older = client.search_runs([experiment], f"tags.`ldft.identity` = '{record.identity}'")
    tags = {"ldft.identity": record.identity, **{f"ldft.{key}": text for key, text in record.tags.items()}}
    begin, end = (int(time.timestamp() * 1000) for time in (record.started_at, record.ended_at))
    run = client.create_run(experiment, begin, tags, record.name[:_LONGEST_NAME]).info.run_id
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
    for old in older:  # last, so that an interruption leaves one of them whole
        client.delete_run(old.info.run_id)
    return f"{record.name} ({run})"


def _artifacts(where: str) -> str | None:
    """Where a new experiment's files go: beside a database in a file, else where the server says. MLflow would take the current
    folder for such a database."""
    if not where.startswith(_SQLITE):
        return None
    return (Path(where.removeprefix(_SQLITE)).absolute().parent / "mlartifacts").as_uri()
