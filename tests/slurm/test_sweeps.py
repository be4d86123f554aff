"""Sweeps as jobs of a real SLURM cluster of two nodes: rows and statuses, whatever happens to jobs and to who submitted them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldft import results
from tests.conftest import long
from tests.slurm.cluster import missing

pytestmark = [
    long,
    pytest.mark.skipif(
        bool(missing()) and "LDFT_REQUIRE_SLURM" not in os.environ, reason=f"a SLURM cluster: {missing()}"
    ),
]
NANO = ("model=nano", "seq_len.tokens=64", "train.iterations=3", "train.warmup_iterations=1")
ENDLESS = ("train.iterations=1000000", "train.warmup_iterations=1", "seq_len.tokens=64")


@pytest.fixture
def sweep(slurm: dict[str, str], tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a sweep as jobs."""

    def command(*words: str) -> list[str]:
        base = ("hydra/launcher=slurm", "launch.device=cpu", "train.precision=fp32", "results.dir=results")
        return [sys.executable, "-m", "ldft", "-m", *base, *words]

    return command


@pytest.fixture
def call(slurm: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=slurm | environment, capture_output=True, text=True, timeout=400, check=False
        )

    return run


def rows(folder: Path) -> dict[Any, Any]:
    """Newest row by seed."""
    table = results.read(folder / "results").sort_values("attempt")
    return {row["cfg.train.seed"]: row for _, row in table.iterrows()}


def until(done: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)
    return found


def test_cells_run_as_jobs_are_followed_and_not_submitted_again(sweep, call, tmp_path: Path) -> None:
    line = sweep(*NANO, "train.seed=1,2,3")
    left = call([*line, "--detach"])
    assert left.returncode == 0 and "submitted" in left.stdout and "the same command again" in left.stdout, left.stderr
    said = call([sys.executable, "-m", "ldft.status", "results"]).stdout
    assert "job " in said and ("queued" in said or "running" in said), said
    done = call(line)
    assert done.returncode == 0 and "waiting or running as jobs already: 3 cells" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "submitted" not in done.stdout and done.stdout.count(" ok ") == 3, done.stdout
    found = rows(tmp_path)
    assert [row["status"] for row in found.values()] == ["ok"] * 3 and {row["attempt"] for row in found.values()} == {1}
    assert len({row["job_id"] for row in found.values()}) == 3 and (tmp_path / "results" / "jobs").is_dir()
    assert not (tmp_path / ".submitit").exists() and not (tmp_path / "multirun").exists()
    again = call(line)
    assert again.returncode == 0 and "3 already have rows" in again.stdout and "submitted" not in again.stdout


def test_the_time_limit_scancel_and_the_memory_limit_have_their_statuses(sweep, call, slurm, tmp_path: Path) -> None:
    # SLURM sends the signal up to a minute early.
    late = sweep(
        *ENDLESS, "model=nano", "train.seed=1", "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=20"
    )
    cancelled = sweep(*ENDLESS, "model=nano", "train.seed=2")
    assert call([*late, "--detach"]).returncode == 0
    assert call([*cancelled, "--detach"]).returncode == 0
    until(lambda: len(list((tmp_path / "results").glob("*/attempt-1/rank-0.json"))) == 2)
    queue = subprocess.run(["squeue", "-h", "-o", "%i"], env=slurm, capture_output=True, text=True, check=True)
    subprocess.run(["scancel", max(queue.stdout.split(), key=int)], env=slurm, check=True)
    # Memory: more than it asked for, with everything killed at once, and nobody there who follows it.
    big = sweep(*ENDLESS, "model=tiny", "model.vocab_size=400000", "train.seed=3", "hydra.launcher.mem_gb=1")
    following = subprocess.Popen(big, cwd=tmp_path, env=slurm, stdout=subprocess.PIPE, text=True)
    until(lambda: len(list((tmp_path / "results").glob("*/job.json"))) == 3)
    following.kill()
    done = call(big)
    assert done.returncode == 1, done.stdout + done.stderr
    call(late)
    found = rows(tmp_path)
    assert {seed: row["status"] for seed, row in found.items()} == {1: "timeout", 2: "interrupted", 3: "oom_host"}
    assert found[1]["signal"] == "SIGUSR2" and "timeout_min" in found[1]["error_message"]
    assert found[2]["signal"] == "SIGTERM"
    assert "mem_gb" in found[3]["error_message"] and found[3]["log_path"].startswith("jobs/"), found[3]["error_message"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_ctrl_c_and_kill_leave_the_jobs_running(sweep, call, slurm, tmp_path: Path, number: signal.Signals) -> None:
    line = sweep(*NANO, "train.seed=1,2")
    process = subprocess.Popen(
        line, cwd=tmp_path, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(lambda: len(list((tmp_path / "results").glob("*/job.json"))) == 2)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    if number == signal.SIGINT:
        assert process.returncode == 130 and "run on" in out and "scancel" in out and "ldft.status" in out, out
    done = call(line)
    assert done.returncode == 0 and "submitted" not in done.stdout, done.stdout + done.stderr
    found = rows(tmp_path).values()
    assert [(row["status"], row["attempt"]) for row in found] == [("ok", 1)] * 2


@pytest.mark.parametrize(
    ("words", "path", "said"),
    [
        (("hydra.launcher.partition=nope",), None, "hydra.launcher: SLURM takes no job like this: invalid partition"),
        ((), "/nowhere", "start the sweep on a login node of a SLURM cluster"),
    ],
)
def test_what_slurm_refuses_is_one_line(sweep, call, words: tuple[str, ...], path: str | None, said: str) -> None:
    done = call(sweep(*NANO, "train.seed=1,2", *words), **({"PATH": path} if path else {}))
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
