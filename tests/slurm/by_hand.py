"""Preemption, a node that fails, and twelve cells of which four end badly, on a real cluster: python -m tests.slurm.by_hand

Takes about ten minutes, most of it SLURM's own waiting before it starts a requeued job. Prints each cell's attempts; exit code 1 if
one is not as it should be. With words after it only these parts: preemption, twelve, failure.
"""

from __future__ import annotations

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
from tests.slurm.cluster import cluster

LINE = [
    *(sys.executable, "-m", "ldft", "-m", "hydra/launcher=slurm", "launch.device=cpu", "train.precision=fp32"),
    *("train.warmup_iterations=1", "seq_len.tokens=64", "results.dir=results", "hydra.launcher.cpus_per_task=2"),
]
SHORT, LONG, ENDLESS = (f"train.iterations={count}" for count in (5, 300, 1_000_000))


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
            found.setdefault(row["cfg.train.seed"], []).append((row["status"], row["signal"] or ""))
        return found

    def trained(self) -> int:
        """How many attempts began to train."""
        files = self.folder.glob("results/*/attempt-*/rank-0.json")
        return sum('"iteration_s"' in path.read_text() for path in files)

    def until_two_train(self, *sweeps: tuple[str, ...]) -> None:
        """Submit sweeps of two cells in all, and return when both train."""
        before = self.trained()
        for words in sweeps:
            self.sweep(*words, "--detach")
        until("both train", lambda: self.trained() >= before + 2)


def until(what: str, done: Callable[[], Any], seconds: float = 400.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.5)
    return found


def preempted(work: Work) -> None:
    """Jobs of a partition with priority take both nodes for ten seconds: both cells are requeued, and take over their cells."""
    work.until_two_train(("model=nano", "train.seed=1,2", LONG))
    work.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 10", "--output=/dev/null")
    work.sweep("model=nano", "train.seed=1,2", LONG)


def node_failed(work: Work, folder: Path) -> None:
    """The daemon of a node and everything on it are killed; SLURM requeues its cell to the other node."""
    work.until_two_train(("model=nano", "train.seed=3,4", LONG))
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


def twelve(work: Work) -> None:
    """Two at a time; one is cancelled, one takes too much memory, one too much time, and eight are just run; then again."""
    slow = ("model=nano", "train.seed=11", ENDLESS, "hydra.launcher.timeout_min=2")
    work.until_two_train(slow, ("model=nano", "train.seed=12", ENDLESS))
    work.run("scancel", max(work.queue(), key=int))
    big = ("model=tiny", "model.vocab_size=400000", "train.seed=13", ENDLESS, "hydra.launcher.mem_gb=1")
    work.sweep(*big, "--detach")
    rest = ("model=nano", f"train.seed={','.join(map(str, range(14, 23)))}", SHORT)
    work.sweep(*rest)
    work.sweep(*big)
    work.sweep(*slow)
    work.sweep(*rest)


def main() -> int:
    parts = sys.argv[1:] or ["preemption", "twelve", "failure"]
    folder, place = (Path(tempfile.mkdtemp(prefix=f"ldft-{name}-")) for name in ("slurm", "sweeps"))
    folder.chmod(0o755)
    with cluster(folder) as env:
        work = Work(place, env)
        if "preemption" in parts:
            preempted(work)
        if "twelve" in parts:
            twelve(work)
        if "failure" in parts:
            node_failed(work, folder)
        found = work.attempts()
    for seed, ended in sorted(found.items()):
        print(seed, ended)
    last = {seed: ended[-1][0] for seed, ended in found.items()}
    wanted = {
        "preemption": dict.fromkeys((1, 2), "ok"),
        "twelve": dict.fromkeys(range(14, 23), "ok") | {11: "timeout", 12: "interrupted", 13: "oom_host"},
        "failure": dict.fromkeys((3, 4), "ok"),
    }
    expected = {seed: status for part in parts for seed, status in wanted[part].items()}
    again = all(("interrupted", "SIGTERM") in found[seed][:-1] for seed in (1, 2) if seed in found)
    right = last == expected and again
    print("as it should be" if right else f"expected {expected}, and attempts of 1 and 2 interrupted")
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
