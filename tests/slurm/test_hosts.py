"""One cell on two hosts of a real SLURM cluster: what it computes and reports, and how it ends when a part of it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.conftest import long
from tests.slurm.cluster import missing

pytestmark = [
    long,
    pytest.mark.skipif(
        bool(missing()) and "LDFT_REQUIRE_SLURM" not in os.environ, reason=f"a SLURM cluster: {missing()}"
    ),
]
COMMON = ("model=nano", "seq_len.tokens=64", "launch.device=cpu", "train.precision=fp32", "launch.num_ranks=2",
          "train.warmup_iterations=1", "results.dir=results")  # fmt: skip
ALLOCATION = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
LDFT = (sys.executable, "-m", "ldft")


def row_of(folder: Path, number: int = 1) -> dict[str, Any]:
    (path,) = folder.glob(f"results/*/attempt-{number}/row.parquet")
    (row,) = pq.read_table(path).to_pylist()
    return row


@pytest.fixture
def call(slurm: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str, folder: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        return subprocess.run(words, cwd=folder, env=slurm, capture_output=True, text=True, timeout=300, check=False)

    return run


def test_two_hosts_train_as_two_ranks_of_one_do(call, tmp_path: Path) -> None:
    """As a sweep's job, which is one of two nodes; each has the cores that a rank of the single host has."""
    sweep = ("-m", "hydra/launcher=slurm", "launch.num_hosts=2", "train.iterations=4", "hydra.launcher.cpus_per_task=2")
    done = call(*LDFT, *sweep, *COMMON)
    assert done.returncode == 0, done.stdout + done.stderr
    there = row_of(tmp_path)
    alone = call(*LDFT, "train.iterations=4", *COMMON, folder=tmp_path / "alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    here = row_of(tmp_path / "alone")
    assert there["status"] == "ok", there["error_message"]
    assert there["loss"] == here["loss"] and there["series_id"] != here["series_id"]
    assert there["hosts"] == ["n0", "n1"] and [one["host"] for one in there["nodes"]] == ["n0", "n1"]
    assert {(one["host"], one["rank"]) for one in there["roles"]} == {("n0", 0), ("n1", 1)}
    assert sorted(one["role"] for one in there["roles"]) == sorted(one["role"] for one in here["roles"])
    assert sum(one["bytes"] for one in there["roles"]) == sum(one["bytes"] for one in here["roles"])
    assert there["predicted_host_gib"] == here["predicted_host_gib"] and len(there["peak_rss_gib"]) == 2
    assert '"n1": {"kernel"' in there["host_environments_json"] and here["host_environments_json"] is None


def test_a_rank_that_is_killed_on_the_other_host_ends_the_run(call, slurm, tmp_path: Path) -> None:
    line = (*ALLOCATION, *LDFT, "launch.num_hosts=2", "train.iterations=1000000", *COMMON)
    process = subprocess.Popen(
        line, cwd=tmp_path, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    victim = until_it_trains(tmp_path, "n1")
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    out = process.communicate(timeout=120)[0]
    row = row_of(tmp_path)
    assert (row["status"], row["signal"]) == ("error", "SIGKILL"), out
    assert "rank 1" in row["error_message"] and row["log_path"].endswith("worker-1.log")
    assert time.monotonic() - began < 40 and row["iteration_s"]
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or ())]


def until_it_trains(folder: Path, node: str) -> psutil.Process:
    """The rank on a node, once it has trained a little."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        reports = [path.read_text() for path in folder.glob("results/*/attempt-1/rank-0.json")]
        if reports and reports[0].count(",") and '"iteration_s": [' in reports[0]:
            for one in psutil.process_iter(["cmdline"]):
                words = one.info["cmdline"] or []
                if "ldft.worker" in words and str(folder) in words[-1] and one.environ().get("SLURMD_NODENAME") == node:
                    return one
        time.sleep(0.3)
    raise AssertionError("it never trained")


@pytest.mark.parametrize(
    ("around", "said"),
    [
        ((), "launch.num_hosts: 2: several hosts need an allocation of SLURM"),
        (("salloc", "--quiet", "--nodes=1", "--ntasks=1"), "this job has 1 nodes; use sbatch --nodes=2"),
    ],
)
def test_several_hosts_need_an_allocation_of_as_many(call, around: tuple[str, ...], said: str) -> None:
    done = call(*around, *LDFT, "launch.num_hosts=2", *COMMON)
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
