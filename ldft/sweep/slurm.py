"""What SLURM says of its jobs and nodes, by squeue, scontrol and sinfo; all work on clusters without accounting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from ldft.errors import LdftError

# States of a job that has ended -> status of a cell that left no row.
_STATUS = {
    "OUT_OF_MEMORY": "oom_host",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "CANCELLED": "interrupted",
    "PREEMPTED": "interrupted",
    "NODE_FAIL": "interrupted",
    "BOOT_FAIL": "interrupted",
    "REVOKED": "interrupted",
}


@dataclass(frozen=True, slots=True)
class Job:
    """A job in the queue."""

    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    nodes: str
    """Where it runs, or in brackets why it does not."""
    left: str
    """Time to its limit, as squeue writes it."""


def queued(jobs: Iterable[str]) -> dict[str, Job]:
    """Those of these jobs that wait or run. Raises LdftError if SLURM does not answer."""
    numbers = sorted({job.partition("_")[0] for job in jobs})
    if not numbers:
        return {}
    done = _call("squeue", "--noheader", "--array", "--format=%i|%T|%R|%L", f"--jobs={','.join(numbers)}")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise LdftError(f"squeue: {_last_line(done)}; try again when SLURM answers")
    found = {}
    for line in done.stdout.splitlines():
        job, state, nodes, left = line.split("|", 3)
        found[job] = Job(state, nodes, left)
    return found


def ended_as(job: str) -> tuple[str, str]:
    """Status of a cell whose job is no longer in the queue and left no row, and SLURM's word for it, empty if it has forgotten."""
    done = _call("scontrol", "--oneliner", "show", "job", job)
    state = re.search(r"JobState=(\w+)", done.stdout)
    word = state[1] if state and not done.returncode else ""
    if not word:
        done = _call("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}")
        word = done.stdout.split("\n")[0].split(" ")[0] if not done.returncode else ""
    return _STATUS.get(word, "error"), word


@cache
def cores(partition: str | None, gpus: int) -> int | None:
    """Cores of a node for a job that takes so many of its GPUs: their part of the cores, or all without GPUs. The smallest of the
    partition's nodes counts. None if SLURM does not say."""
    done = _call(
        "sinfo", "--noheader", "--Node", "--format=%c|%G", *([f"--partition={partition}"] if partition else [])
    )
    found = []
    for line in done.stdout.splitlines() if not done.returncode else ():
        number, _, gres = line.partition("|")
        there = sum(int(count) for count in re.findall(r"gpu(?::[^:(,]+)?:(\d+)", gres))
        if number.isdigit() and there >= gpus:
            found.append(int(number) * gpus // there if gpus else int(number))
    return max(1, min(found)) if found else None


def nodes(partition: str | None) -> int | None:
    """Nodes of a partition, or of the default one, which sinfo marks by a star. None if SLURM does not say."""
    done = _call("sinfo", "--noheader", "--format=%P|%D", *([f"--partition={partition}"] if partition else []))
    found = 0
    for line in done.stdout.splitlines() if not done.returncode else ():
        name, _, count = line.partition("|")
        if count.strip().isdigit() and (partition or name.endswith("*")):
            found += int(count)  # one line for nodes of each state
    return found or None


def ranges(jobs: Iterable[str]) -> str:
    """`jobs 12_[0-3,5], 14`: short for many."""
    found: dict[str, list[int]] = {}
    for job in jobs:
        number, _, task = job.partition("_")
        found.setdefault(number, []).extend([int(task)] if task.isdigit() else [])
    words = []
    for number, tasks in sorted(found.items(), key=lambda item: int(item[0])):
        runs: list[list[int]] = []
        for index in sorted(tasks):
            if runs and index == runs[-1][1] + 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        text = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
        words.append(f"{number}_[{text}]" if text else number)
    return ", ".join(words)


def arrays(jobs: Iterable[str]) -> str:
    """The numbers that scancel takes for all of them."""
    return " ".join(sorted({job.partition("_")[0] for job in jobs}, key=int))


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    """Raises LdftError if there is no SLURM here, or if it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        if command[0] == "sacct":
            return subprocess.CompletedProcess(command, 1, "", "")
        raise LdftError(f"{command[0]}: not found; start the sweep on a login node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise LdftError(f"{command[0]} did not answer within a minute; try again when SLURM answers") from None


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
