"""results.log_to: a run's finished row goes to the trackers that were asked for, and nothing about them can harm it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldft.config import results
from ldft.runner import trackers
from tests import synthetic
from tests.conftest import Done, compose, long


def runs_in(folder: Path) -> list[Any]:
    """The runs of the experiment `ldft` in the folder's MLflow database."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return list(client.search_runs([client.get_experiment_by_name("ldft").experiment_id]))


def test_run_is_logged_once_its_row_is_written(ldft: Callable[..., Done]) -> None:
    done = ldft("results.log_to=[tensorboard,mlflow]", "monitor.interval_s=0.2")
    assert done.exit_code == 0, done.stderr
    (one,) = runs_in(done.results_dir)
    row = done.row
    assert one.data.tags["ldft.identity"] == f"{row['run_id']}-1" and one.info.status == "FINISHED"
    assert one.data.metrics["tokens_per_s"] == row["tokens_per_s"] and one.data.params["model.name"] == "nano"
    (folder,) = (done.results_dir / "tensorboard").iterdir()
    assert f"ldft: logged to tensorboard: {folder}" in done.stdout.splitlines()
    assert "ldft: logged to mlflow: nano 64 default" in done.stdout
    assert list(row["cfg.results.log_to"]) == ["tensorboard", "mlflow"]


@long
def test_cells_of_a_sweep_are_logged_refused_ones_too(ldft: Callable[..., Done]) -> None:
    done = ldft("-m", "results.log_to=[mlflow]", "memory.capacity_gib=100,0.001")
    runs = runs_in(done.results_dir)
    assert {one.data.tags["ldft.identity"] for one in runs} == {f"{run_id}-1" for run_id in done.rows["run_id"]}
    assert {one.data.tags["ldft.status"]: one.info.status for one in runs} == {"ok": "FINISHED", "invalid": "FAILED"}


@long
def test_row_is_safe_from_a_server_that_is_not_there(ldft: Callable[..., Done]) -> None:
    done = ldft("results.log_to=[mlflow]", env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"})
    assert done.exit_code == 0 and done.row["status"] == "ok"
    (line,) = [line for line in done.stderr.splitlines() if "logged" in line]
    assert line.startswith(
        "ldft: warning: the row is written, but not logged to mlflow: MLflow at http://127.0.0.1:1: "
    )
    assert line.endswith(
        f"python -m ldft.results log --mlflow http://127.0.0.1:1 {done.results_dir}/{done.row['run_id']}/attempt-1"
    )


@long
def test_tracker_that_never_answers_is_given_up_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What another tracker had by then is not forgotten; the sweep's next cells do not wait again."""
    folder = synthetic.leave(tmp_path / "a folder", synthetic.config())
    monkeypatch.setattr(trackers, "_LIMIT_S", 30)
    monkeypatch.setattr(trackers, "_silent", set())
    config = compose("results.log_to=[tensorboard,mlflow]")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection and says nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        (line,) = trackers.log(config, folder)
        said = capsys.readouterr().err
        assert line.startswith("ldft: logged to tensorboard: ") and len(said.splitlines()) == 1
        assert (
            "not logged to mlflow: no answer within 30 s; to log it later: python -m ldft.results log --mlflow" in said
        )
        assert said.endswith(f"'{folder}'\n")
        (line,) = trackers.log(config, folder)
    assert line.startswith("ldft: logged to tensorboard: ") and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[mlfow]", "results.log_to: 'mlfow' is no tracker that ldft knows; use tensorboard, mlflow, wandb"),
        ("[mlflow,mlflow]", "results.log_to: names mlflow 2 times; once is enough"),
        ("[wandb]", "results.log_to: wandb not installed; pip install 'ldft[wandb]'"),
    ],
)
@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_wrong_trackers_are_refused_before_anything_is_written(
    here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, value: str, said: str, sweep: tuple[str, ...]
) -> None:
    monkeypatch.setattr(results, "find_spec", lambda name: None if name == "wandb" else sys)
    done = here(*sweep, "model=nano", f"results.log_to={value}")
    assert (done.exit_code, done.stderr) == (2, f"ldft: {said}\n")
    assert not list(done.results_dir.glob("*/attempt-*"))
