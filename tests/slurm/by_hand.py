"""Twelve cells of which one is cancelled, one takes too much memory, one too much time and one is preempted, while the process that
submitted them is killed; and a node that fails; on a real cluster: python -m tests.slurm.by_hand

Takes about ten minutes, most of it SLURM's own waiting before it starts a requeued job. Prints each cell's attempts; exit code 1 if
one is not as it should be. With words after it only these parts: twelve, failure.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ldft import results
from ldft.sweep import jobs
from tests.slurm.cluster import cluster

LINE = [
    *(sys.executable, "-m", "ldft", "-m", "hydra/launcher=slurm", "launch.device=cpu", "train.precision=fp32"),
    *("train.warmup_iterations=1", "seq_len.tokens=64", "results.dir=results", "hydra.launcher.cpus_per_task=2"),
]
LONG = "train.iterations=300"


class Work:
    """A folder with results, and the commands that work in it."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)

    def sweep(self, *words: str) -> None:
        print(f"$ ... {' '.join(words)}", flush=True)
        print(self.run(*LINE, *words).stdout, flush=True)

    def queue(self) -> dict[str, str]:
        """Job, as SLURM numbers each task of an array -> node."""
        lines = self.run("squeue", "-h", "-r", "-o", "%A|%N").stdout.splitlines()
        return dict(line.split("|") for line in lines)

    def attempts(self) -> dict[int, list[tuple[str, str]]]:
        """Seed -> status and signal of each attempt."""
        found: dict[int, list[tuple[str, str]]] = {}
        for _, row in results.read(self.folder / "results").sort_values("attempt").iterrows():
            found.setdefault(row["cfg.train.seed"], []).append(
                (row["status"], row["signal"] if isinstance(row["signal"], str) else "")
            )
        return found

    def trained(self) -> int:
        """How many attempts began to train."""
        return sum('"iteration_s"' in path.read_text() for path in self.folder.glob("results/*/attempt-*/rank-0.json"))

    def trains(self, seed: int) -> Path | None:
        """The folder of a cell whose first attempt has begun to train."""
        for config in self.folder.glob("results/*/attempt-1/config.json"):
            rank = config.with_name("rank-0.json")
            if json.loads(config.read_text())["train"]["seed"] == seed and rank.exists():
                return config.parent.parent if '"iteration_s"' in rank.read_text() else None
        return None

    def job(self, seed: int) -> str:
        """The job of a cell that trains, as scancel takes it."""
        folder = self.trains(seed)
        assert folder, seed
        return str(jobs.submitted(folder.parent, folder.name))

    def until_two_train(self, *words: str) -> None:
        """Submit a sweep of two cells, and return when both train."""
        before = self.trained()
        self.sweep(*words, "--detach")
        until("both train", lambda: self.trained() >= before + 2)


def until(what: str, done: Callable[[], Any], seconds: float = 400.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.5)
    return found


def node_failed(work: Work, folder: Path) -> None:
    """The daemon of a node and everything on it are killed; SLURM requeues its cell to the other node."""
    work.until_two_train("model=nano", "train.seed=3,4", LONG)
    (lost,) = (job for job, node in work.queue().items() if node == "n1")
    # First what would report the end of the others.
    os.kill(int((folder / "d-n1.pid").read_text()), signal.SIGKILL)
    processes = list(psutil.process_iter(["cmdline"]))
    for one in processes:
        if f"[{lost}." in " ".join(one.info["cmdline"] or ()):
            one.kill()
    for one in processes:
        if _environment(one).get("SLURM_JOB_ID") == lost:
            one.kill()
    work.sweep("model=nano", "train.seed=3,4", LONG)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


# Seeds of the twelve cells. The first two train at once, and end only when they are told to; BIG needs more than its job's 4 GB.
SLOW, CANCELLED, BIG, PREEMPTED, *REST = range(11, 23)
POINTS = [
    {"model": "nano", "train.seed": f"{SLOW},{CANCELLED}", "train.iterations": 1_000_000},
    {"model": "tiny", "model.vocab_size": 3_000_000, "train.seed": BIG, "train.iterations": 1_000_000},
    {"model": "nano", "train.seed": PREEMPTED, "train.iterations": 300},
    {"model": "nano", "train.seed": ",".join(map(str, REST)), "train.iterations": 5},
]


def twelve(work: Work) -> None:
    """One sweep of twelve cells, two at a time; then the same command again, which submits nothing that ran or runs."""
    (work.folder / "conf" / "sweep").mkdir(parents=True)
    points = {"hydra": {"mode": "MULTIRUN", "sweeper": {"points": POINTS}}, "sweep": {"name": "twelve"}}
    text = "# @package _global_\n" + json.dumps(points)
    (work.folder / "conf" / "sweep" / "twelve.yaml").write_text(text)
    words = [*LINE, "--config-dir=conf", "+sweep=twelve", "hydra.launcher.timeout_min=4", "hydra.launcher.mem_gb=4"]
    print(f"$ ... {' '.join(words[len(LINE) :])}", flush=True)
    first = subprocess.Popen(words, cwd=work.folder, env=work.env)
    until("two train", lambda: work.trained() >= 2)
    work.run("scancel", work.job(CANCELLED))
    until("the preempted one trains", lambda: work.trains(PREEMPTED))
    node = work.run("squeue", "-h", "-o", "%N", f"--jobs={work.job(PREEMPTED)}").stdout.strip()
    work.run("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--wrap=sleep 10", "--output=/dev/null")
    first.kill()  # -9, while nine cells wait
    for _ in range(2):
        print(work.run(*words).stdout, flush=True)


def main() -> int:
    parts = sys.argv[1:] or ["twelve", "failure"]
    folder, place = (Path(tempfile.mkdtemp(prefix=f"ldft-{name}-")) for name in ("slurm", "sweeps"))
    folder.chmod(0o755)
    with cluster(folder) as env:
        work = Work(place, env)
        if "twelve" in parts:
            twelve(work)
        if "failure" in parts:
            node_failed(work, folder)
        found = work.attempts()
    ok, told = ("ok", ""), ("interrupted", "SIGTERM")
    late = ("timeout", "SIGUSR2")
    wanted = {
        # An interrupted cell runs again with the same command.
        "twelve": {SLOW: [late], CANCELLED: [told, late], BIG: [("oom_host", "")], PREEMPTED: [told, ok]}
        | {seed: [ok] for seed in REST},
        "failure": {seed: [ok] for seed in (3, 4)},
    }
    right = True
    for part in parts:
        for seed, attempts in wanted[part].items():
            ends = found.pop(seed, [])
            # What the failed node's cell had done is lost with its job, or written as interrupted.
            right &= ends == attempts if part == "twelve" else ends[-1:] == attempts
            print(seed, ends)
    right &= not found
    print("as it should be" if right else f"expected {wanted}")
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
