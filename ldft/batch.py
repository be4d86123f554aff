"""The job of a batch system in which this process runs, from the environment that SLURM sets for each job."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time


def job_id() -> str | None:
    """The job's number as squeue and scancel take it: `123`, or `123_4` in a job array. None outside a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def host() -> str:
    """This machine, by SLURM's name for it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def address() -> str:
    """Where the other hosts of the job reach this one: its name or, if that does not resolve, its address as SLURM knows it."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        shown = subprocess.run(["scontrol", "show", "node", host()], capture_output=True, text=True, check=False).stdout
        if found := re.search(r"NodeAddr=(\S+)", shown):
            return found[1]
    return name


def host_number() -> int:
    """This host's number among those of the run, from 0: of the step's task, one on each host."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def step() -> str | None:
    """The job's step that this process belongs to, as scancel takes it; None outside one."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    return f"{job}.{step}" if job and step else None


def hosts_of_job() -> int | None:
    """Number of hosts of the job; None outside a job."""
    text = os.environ.get("SLURM_JOB_NUM_NODES", "")
    return int(text) if text.isdigit() else None


def restarts() -> int:
    """How often the job was requeued, after preemption or because a node failed."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdigit() else 0


def seconds_left() -> float | None:
    """Until the job's time limit; None outside a job, or if it has none that SLURM tells."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    if text.isdigit():
        return int(text) - time.time()
    job = job_id()
    if job is None:
        return None
    # Before SLURM 23.02. Not the end that squeue gives: once scancel has been called, that is now.
    try:
        command = ["squeue", "--noheader", "--format=%S|%l", f"--jobs={job}"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        start, _, limit = said.partition("|")
        return time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S")) + _seconds(limit) - time.time()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _seconds(limit: str) -> int:
    """SLURM's `days-hours:minutes:seconds`, of which the front may be left out. Raises ValueError for UNLIMITED and the like."""
    days, _, clock = limit.rpartition("-")
    found = 0
    for part in clock.split(":"):
        found = 60 * found + int(part)
    return found + 86400 * int(days or 0)
