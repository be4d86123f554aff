"""Runs inside a batch system's job: its number in the row, its time limit as a status, and what its requeueing ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from ldft import batch
from ldft.results import attempt
from ldft.runner import final_status

JOB = {"SLURM_JOB_ID": "61", "SLURM_ARRAY_JOB_ID": "55", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the environment of a job."""

    def set_(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_


def test_the_warning_of_a_time_limit_ends_the_run_as_timeout_with_what_was_reached(
    tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    endless = command("train.iterations=100000", "train.warmup_iterations=1", "results.dir=results")
    process = subprocess.Popen(endless, cwd=tmp_path, env=os.environ | JOB, stdout=subprocess.PIPE, text=True)
    try:
        report = next_report(tmp_path, process)
        # SLURM sends it to every process of the job's step.
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "ldft.worker" in p.cmdline()]
        for one in ranks:
            one.send_signal(signal.SIGUSR2)
        time.sleep(1.0)
        assert ranks and all(one.is_running() for one in ranks), "the parent decides, not the rank"
        process.send_signal(signal.SIGUSR2)
        process.communicate(timeout=60)
    finally:
        process.kill()
    (row,) = pq.read_table(next(tmp_path.glob("results/*/attempt-1/row.parquet"))).to_pylist()
    assert (row["status"], row["signal"], row["job_id"]) == ("timeout", "SIGUSR2", "55_3")
    assert "time limit" in row["error_message"] and len(row["iteration_s"]) >= len(report["iteration_s"])
    assert process.returncode == 1


def next_report(folder: Path, process: subprocess.Popen[str]) -> dict[str, list[float]]:
    """Rank 0's first report with two iterations."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob("results/*/attempt-1/rank-0.json"):
            report: dict[str, list[float]] = json.loads(path.read_text())
            if len(report.get("iteration_s", [])) >= 2:
                return report
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


@pytest.mark.parametrize(
    ("name", "left_s", "status"),
    [
        ("SIGUSR2", None, "timeout"),
        ("SIGUSR2", 120, "timeout"),
        ("SIGUSR2", 3600, "interrupted"),  # preempted
        ("SIGTERM", 2, "timeout"),
        ("SIGTERM", 120, "interrupted"),  # scancel
        ("SIGTERM", None, "interrupted"),
        ("SIGINT", 2, "interrupted"),
    ],
)
def test_a_signal_means_the_time_limit_only_near_the_jobs_end(
    job: Callable[..., None], name: str, left_s: int | None, status: str
) -> None:
    if left_s is not None:
        job(SLURM_JOB_END_TIME=str(int(time.time()) + left_s))
    found = final_status.stopped(name)
    assert (found.status, found.signal) == (status, name)


@pytest.mark.parametrize(
    ("limit", "left_s"), [("2:00", 90), ("1:00:00", 3570), ("1-02:00:03", 93573), ("UNLIMITED", None), ("", None)]
)
def test_the_time_left_comes_from_squeue_where_the_job_does_not_know_it(
    tmp_path: Path, job: Callable[..., None], limit: str, left_s: int | None
) -> None:
    """As squeue before SLURM 23.02 answers for a job that began 30 seconds ago."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 30))
    (tmp_path / "squeue").write_text(f'#!/bin/sh\necho "{began}|{limit}"\n')
    (tmp_path / "squeue").chmod(0o755)
    job(**JOB, PATH=f"{tmp_path}:{os.environ['PATH']}")
    found = batch.seconds_left()
    assert found == (pytest.approx(left_s, abs=3) if left_s else None)


def test_a_requeued_job_takes_over_from_its_own_earlier_start_only(tmp_path: Path, job: Callable[..., None]) -> None:
    assert batch.job_id() is None and attempt.owner()["job"] is None
    job(**JOB)
    folder = attempt.try_claim(tmp_path, "cell", 1)
    assert folder
    started = attempt.read_json(folder / "started.json")
    assert (started["job"], started["restarts"]) == ("55_3", 0)
    # Its node is gone; its last heartbeat is young.
    attempt.write_json(folder / "started.json", started | {"here": "a node that is gone"})
    assert attempt.is_alive(folder)
    job(SLURM_RESTART_COUNT="1")
    assert not attempt.is_alive(folder), "this is the job that was requeued"
    job(SLURM_ARRAY_TASK_ID="4")
    assert attempt.is_alive(folder), "another job of the array"


def test_a_host_whose_name_does_not_resolve_is_reached_by_its_address(
    tmp_path: Path, job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "nowhere.invalid")
    job(SLURMD_NODENAME="n7", PATH=f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$3" = n7 ] && echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=$3"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    assert (batch.address(), batch.host()) == ("10.0.0.7", "n7")
    monkeypatch.undo()
    assert batch.address() == socket.gethostname()


def test_temporary_files_are_named_by_host_and_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts that share a folder may have processes of one number."""
    names = []
    for host in ("n0", "n1"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr(Path, "rename", lambda self, target: names.append(self.name))
        attempt.try_claim(tmp_path, "cell", 1)
    assert len(set(names)) == 2
