"""One cell on two hosts of a real SLURM cluster: what it computes and reports, and how it ends when a part of it fails."""

from __future__ import annotations

import contextlib
import json
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
from tests.numa_vm.reader import Reader
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
    process = started(slurm, tmp_path)
    victim = until_it_trains(tmp_path, "n1")
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    out = process.communicate(timeout=120)[0]
    row = row_of(tmp_path)
    assert (row["status"], row["signal"]) == ("error", "SIGKILL"), out
    assert "rank 1" in row["error_message"] and row["log_path"].endswith("worker-1.log")
    assert time.monotonic() - began < 40 and row["iteration_s"]
    assert nothing_runs_in(tmp_path)


def test_what_each_host_holds_is_what_a_reader_from_outside_sees(slurm, tmp_path: Path) -> None:
    process = started(slurm, tmp_path, iterations=300)
    other = until_it_trains(tmp_path, "n1")
    seen = [*bytes_of_roles(tmp_path, "n0", 0, process_of(tmp_path, "n0")), *bytes_of_roles(tmp_path, "n1", 1, other)]
    out = process.communicate(timeout=120)[0]
    row = row_of(tmp_path)
    assert row["status"] == "ok", out
    said = [(one["host"], one["rank"], one["role"], one["node"], one["share"] * one["bytes"]) for one in row["roles"]]
    assert sorted(seen) == [(*names, pytest.approx(size, abs=2 * 4096)) for *names, size in sorted(said)]


def test_a_host_that_is_silent_ends_the_run(slurm, tmp_path: Path) -> None:
    """It stands still: neither its agent nor its rank writes or ends."""
    process = started(slurm, tmp_path)
    rank = until_it_trains(tmp_path, "n1")
    (agent,) = (one for one in rank.parents() if "ldft.runner.agent" in one.cmdline())
    for one in (agent, rank):
        one.suspend()
    began = time.monotonic()
    out = process.communicate(timeout=200)[0]
    row = row_of(tmp_path)
    assert (row["status"], row["error_type"]) == ("error", "SilentHost"), out
    assert row["error_message"].startswith("host n1 was silent for 60 s") and 55 < time.monotonic() - began < 130
    end = time.monotonic() + 60
    while not nothing_runs_in(tmp_path) and time.monotonic() < end:
        time.sleep(0.5)
    assert nothing_runs_in(tmp_path), "SLURM kills what the end of the job leaves"


def test_a_parent_that_is_killed_leaves_nothing_in_its_allocation(slurm, tmp_path: Path) -> None:
    line = (
        *ALLOCATION,
        "bash",
        "-c",
        '"$@"; sleep 100',
        "bash",
        *LDFT,
        "launch.num_hosts=2",
        "train.iterations=1000000",
    )
    allocated = subprocess.Popen([*line, *COMMON], cwd=tmp_path, env=slurm, start_new_session=True)
    until_it_trains(tmp_path, "n1")
    (started_by,) = tmp_path.glob("results/*/attempt-1/started.json")
    os.kill(json.loads(started_by.read_text())["pid"], signal.SIGKILL)
    end = time.monotonic() + 30
    while not nothing_runs_in(tmp_path) and time.monotonic() < end:
        time.sleep(0.5)
    kept = allocated.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(allocated.pid, signal.SIGKILL)
    allocated.wait()
    subprocess.run(["scancel", "--user=root"], env=slurm, check=False)
    assert kept and nothing_runs_in(tmp_path)


def started(slurm: dict[str, str], folder: Path, iterations: int = 1_000_000) -> subprocess.Popen[str]:
    """A run on two hosts."""
    line = (*ALLOCATION, *LDFT, "launch.num_hosts=2", f"train.iterations={iterations}", *COMMON)
    return subprocess.Popen(line, cwd=folder, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def nothing_runs_in(folder: Path) -> bool:
    return not [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def bytes_of_roles(folder: Path, host: str, rank: int, process: psutil.Process) -> list[tuple[str, int, str, int, int]]:
    """Host, rank, role, node and bytes there, of the tensors at the addresses that the rank reported."""
    (path,) = folder.glob(f"results/*/attempt-1/rank-{rank}.json")
    found = []
    for role, tensors in json.loads(path.read_text())["role_addresses"].items():
        nodes = Reader()(process.pid, [(address, size) for _, address, size in tensors])["exact_nodes"]
        for node in {node for one in nodes for node in one}:
            found.append((host, rank, role, int(node), 4096 * sum(one.get(node, 0) for one in nodes)))
    return found


def until_it_trains(folder: Path, node: str) -> psutil.Process:
    """The rank on a node, once it has trained a little."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        reports = [path.read_text() for path in folder.glob("results/*/attempt-1/rank-0.json")]
        if reports and reports[0].count(",") and '"iteration_s": [' in reports[0]:
            return process_of(folder, node)
        time.sleep(0.3)
    raise AssertionError("it never trained")


def process_of(folder: Path, node: str) -> psutil.Process:
    """The rank on a node."""
    (found,) = (
        one
        for one in psutil.process_iter(["cmdline"])
        for words in [one.info["cmdline"] or []]
        if "ldft.worker" in words and str(folder) in words[-1] and one.environ().get("SLURMD_NODENAME") == node
    )
    return found


def test_more_hosts_than_the_partition_has_are_refused_at_once(call) -> None:
    """SLURM would let such a job wait for ever."""
    more = [word.replace("num_ranks=2", "num_ranks=3") for word in COMMON]
    done = call(*LDFT, "-m", "hydra/launcher=slurm", "launch.num_hosts=3", *more)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "launch.num_hosts: 3: the default partition has 2 nodes; use up to 2" in done.stderr


@pytest.mark.parametrize(
    ("around", "said"),
    [
        ((), "launch.num_hosts: 2: several hosts need an allocation of SLURM"),
        (("salloc", "--quiet", "--nodes=1", "--ntasks=1"), "this job has 1 node; use sbatch --nodes=2"),
    ],
)
def test_several_hosts_need_an_allocation_of_as_many(call, around: tuple[str, ...], said: str) -> None:
    done = call(*around, *LDFT, "launch.num_hosts=2", *COMMON)
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
