"""`python -m ldft.results log`: wrong targets, trackers that fail in the middle, rows elsewhere, several jobs at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldft.errors import ResultsError
from ldft.results import store
from ldft.results.__main__ import main
from multirun_analysis import trackers
from tests.analysis.conftest import Rows
from tests.analysis.tracked import Log, mlflow_runs, of_its_own
from tests.conftest import long


def test_older_run_stays_until_the_new_one_is_whole(
    full_row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends in the middle, one whole run is there, and logging again leaves that one alone."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    where = str(tmp_path / "mlruns")
    (one,) = trackers.records(full_row, draw=False)
    trackers.TRACKERS["mlflow"](one, where)
    with monkeypatch.context() as patch:

        def lost(*_: Any) -> None:
            raise MlflowException("the server went away")

        patch.setattr(MlflowClient, "set_terminated", lost)
        with pytest.raises(ResultsError, match=r"the server went away; correct the URI, or start the server$"):
            trackers.TRACKERS["mlflow"](one, where)
    assert sorted(found.info.status for found in mlflow_runs(where, monkeypatch)[1]) == ["FINISHED", "RUNNING"]
    trackers.TRACKERS["mlflow"](one, where)
    (left,) = mlflow_runs(where, monkeypatch)[1]
    assert left.info.status == "FINISHED" and left.data.metrics["iteration_median_s"] == 1.25


def test_deleted_experiment_is_one_line(full_row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(tmp_path / "mlruns")
    (one,) = trackers.records(full_row, draw=False)
    trackers.TRACKERS["mlflow"](one, where)
    client, runs = mlflow_runs(where, monkeypatch)
    client.delete_experiment(runs[0].info.experiment_id)
    with pytest.raises(ResultsError, match="the experiment ldft is deleted; restore it, or set MLFLOW_EXPERIMENT_NAME"):
        trackers.TRACKERS["mlflow"](one, where)


@long
def test_a_tracker_that_fails_keeps_no_row_from_the_others(rows: Rows, tmp_path: Path, log: Log) -> None:
    rows.add()
    rows.add(seed=1)
    done = log(
        str(rows.folder), "--no-figures", "--mlflow", "http://127.0.0.1:1", "--tensorboard", str(tmp_path / "tb")
    )
    assert (
        done.returncode == 1 and done.stderr.count("ldft: not logged to mlflow: ") == len(done.stderr.splitlines()) == 1
    )
    assert len(list((tmp_path / "tb").iterdir())) == 2


def test_row_is_found_where_it_was_merged(rows: Rows, tmp_path: Path) -> None:
    first, _ = rows.add(), rows.add(seed=1)
    store.compact(rows.folder)
    (one,) = trackers.records(first.parent, draw=False)
    assert one.run_id == first.parent.parent.name and not first.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultsError, match="no rows in"):
        list(trackers.records(tmp_path / "empty"))


@long
def test_jobs_that_end_together_share_a_new_database(
    full_row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = [sys.executable, "-m", "ldft.results", "log", str(full_row), "--no-figures", "--mlflow", where]
    jobs = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [(job.communicate(timeout=300)[1], job.returncode) for job in jobs]
    assert ends == [("", 0)] * 4
    assert len(mlflow_runs(where, monkeypatch)[1]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name at least one tracker: --tensorboard FOLDER, --mlflow URI, --wandb PROJECT"),
        (("--mlflow", "http://127.0.0.1:1"), "ldft: not logged to mlflow: MLflow at http://127.0.0.1:1: "),
        (("--mlflow", "nonsense://x"), "correct the URI"),
        (("--mlflow", "127.0.0.1:5000"), "begins with http:// or https://, as in http://127.0.0.1:5000"),
        (("--mlflow", "sqlite://"), "has three slashes, as in sqlite:///results/mlflow.db"),
        (("--mlflow", "postgresql://h/d"), "install it, or use another store"),
        (("--mlflow", "sqlite:///{junk}"), "file is not a database"),
        (("--mlflow", "sqlite:////proc/1/x/m.db"), "No such file or directory"),
        (("--tensorboard", "/proc/1/x"), "cannot write /proc/1/x"),
    ],
)
def test_wrong_targets_are_one_line(
    full_row: Path, tmp_path: Path, log: Log, words: tuple[str, ...], said: str
) -> None:
    (junk := tmp_path / "junk").write_text("no database " * 1000)
    done = log(str(full_row), *(word.replace("{junk}", str(junk)) for word in words), "--no-figures")
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


@long
def test_wandb_without_an_account_is_one_line(full_row: Path, tmp_path: Path) -> None:
    folder = str(tmp_path)
    variables = {"WANDB_API_KEY": "", "WANDB_MODE": "online", "HOME": folder, "WANDB_DIR": folder}
    done = of_its_own(str(full_row), "--wandb", "mine", "--no-figures", **variables)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "run wandb login, or set WANDB_MODE=offline" in done.stderr


def test_a_tracker_that_is_not_installed_is_one_line(
    full_row: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldft.config import results

    monkeypatch.setattr(results, "find_spec", lambda name: None if name == "alembic" else object())
    monkeypatch.setattr(sys, "argv", ["ldft.results", "log", str(full_row), "--mlflow", "http://x"])
    assert main() == 1
    assert capsys.readouterr().err == "ldft: --mlflow: alembic not installed; pip install 'ldft[mlflow]'\n"


def test_no_rows_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a folder"):
        list(trackers.records(tmp_path / "none"))
