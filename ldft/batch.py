"""The job of a batch system in which this process runs, from the environment that SLURM sets for each job."""

from __future__ import annotations

import os
import time


def job_id() -> str | None:
    """The job's number as squeue and scancel take it: `123`, or `123_4` in a job array. None outside a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def restarts() -> int:
    """How often the job was requeued, after preemption or because a node failed."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdigit() else 0


def seconds_left() -> float | None:
    """Until the job's time limit; None outside a job, or if SLURM does not tell (before 22.05)."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(text) - time.time() if text.isdigit() else None
