"""The job of a batch system in which this process runs, from the environment that SLURM sets for each job, or that other systems
set on each host of a run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass

from ldft.errors import ConfigError

# Variables that number a run's hosts, and the port if they name none: torchrun's own (Kubeflow's TrainJob sets them), SkyPilot's,
# and those that scripts for torchrun commonly use.
_NUMBERED = (
    ("PET_NODE_RANK", "PET_NNODES", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS", "MASTER_PORT"),
    ("NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT"),
)
_PORT = 29400


@dataclass(frozen=True, slots=True)
class Given:
    """This host among those of a run, as the environment says."""

    number: int
    """From 0."""
    count: int
    address: str
    """Of the first host."""
    port: int
    """Where the first host listens."""
    number_name: str
    count_name: str
    port_name: str
    """The variables that say so."""


def given() -> Given | None:
    """None within a SLURM job, which numbers its hosts itself, and if this is the only host. Raises ConfigError if a variable is
    missing or wrong."""
    if job_id() is not None:
        return None
    for names in _NUMBERED:
        number, count, address, port = (os.environ.get(name, "").strip() for name in names)
        if not number or count in ("", "1"):
            continue
        for name, value in ((names[0], number), (names[1], count), (names[3], port or "1")):
            if not value.isdecimal():
                raise ConfigError("launch.num_hosts", f"{name}={value} is no number; correct it, or unset {names[0]}")
        if port and not 0 < int(port) < 65536:
            raise ConfigError("launch.num_hosts", f"{names[3]}={port} is no port; use 1 to 65535")
        if not address:
            raise ConfigError(
                "launch.num_hosts", f"{names[2]} is not set; set it to the first host's address, or unset {names[0]}"
            )
        if int(number) >= int(count):
            raise ConfigError(
                "launch.num_hosts", f"{names[0]}={number} is not below {names[1]}={count}; correct it, or unset it"
            )
        return Given(int(number), int(count), address.split()[0], int(port or _PORT), names[0], names[1], names[3])
    return None


def job_id() -> str | None:
    """The job's number as squeue and scancel take it: `123`, or `123_4` in a job array. None outside a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def host() -> str:
    """This machine, by SLURM's name for it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def address() -> str:
    """Where the other hosts reach this one, the first: its name or, if that does not resolve, its address as SLURM knows it; or as
    the environment says."""
    if one := given():
        return one.address
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
    one = given()
    return one.number if one else int(os.environ.get("SLURM_PROCID", "0"))


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
