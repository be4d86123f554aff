"""The cells of a sweep as jobs of SLURM: submit those that neither ran nor run, follow them, and write the rows of jobs that ended
without one.

results/<run_id>/job.json: the newest job that was submitted for a cell. All else is in the rows and in SLURM's queue, so that the
process that submitted may end at any moment.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ldft import environment
from ldft.config import Config, Device, run_id
from ldft.errors import ConfigError, LdftError
from ldft.preflight.resolved import resolve
from ldft.results import attempt
from ldft.results.history import History
from ldft.runner import parent
from ldft.sweep import cell, slurm
from ldft.sweep.plan import Cell
from ldft.terminal import plural

# Of the memory that a job asks for: part of the estimate, and the parent, file pages and Python beside it.
_MARGIN, _BESIDE_GIB = 1.1, 2.0
_POLL_S = 2.0
_NO_CLUSTER = re.compile(r"fetch_config|Unable to contact slurm controller", re.IGNORECASE)
_OVER_MEMORY = re.compile(r"exceeded (job )?memory limit|oom[-_]kill|OOM Killed", re.IGNORECASE)
# Writes of other hosts appear late on shared file systems: so long after its job a row may still come.
_LATE_S = 10.0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a cell's job asks SLURM for on each of its nodes, where the user did not say."""

    nodes: int
    mem_gb: int
    gpus_per_node: int | None
    cpus_per_task: int | None


class Launcher(Protocol):
    """What the Hydra plugin offers."""

    detach: bool
    partition: str | None

    def submit(self, cells: Sequence[list[str]], needs: Needs) -> list[str]: ...


def submitted(results_dir: Path, cell_id: str) -> str | None:
    """The newest job of a cell."""
    found = attempt.read_json(results_dir / cell_id / "job.json").get("job")
    return str(found) if found else None


def needs(config: Config, partition: str | None) -> Needs:
    """By the cell's estimate. A GPU's memory is unknown here, so nothing of the optimizer is expected on it. A cell that is refused
    has none: its job writes the row that says why."""
    ranks = config.launch.ranks_per_host
    gpus = ranks if config.launch.device is Device.cuda else 0
    estimated = 0.0
    with environment.assumed(environment.Assumed(ranks, None)), contextlib.suppress(ConfigError):
        estimated = resolve(config).estimate.host_bytes / 2**30
    return Needs(
        config.launch.num_hosts,
        math.ceil(_MARGIN * estimated + _BESIDE_GIB),
        gpus or None,
        slurm.cores(partition, gpus),
    )


class Jobs:
    """The jobs of a sweep's cells."""

    def __init__(self, results_dir: Path, configs: dict[str, Config], history: History) -> None:
        self._results_dir = results_dir
        self._configs = configs
        self._history = history
        self._job_of: dict[str, str] = {}
        self._gone_since: dict[str, float] = {}

    def sort(self, cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
        """Those of the cells whose job waits or runs, or which a process works on; and those to be submitted.

        Writes the rows of jobs that ended without one while nobody followed them: such a cell may not need to run again.
        """
        known = {one.run_id: job for one in cells if (job := submitted(self._results_dir, one.run_id))}
        queue = slurm.queued(known.values())
        busy, new = [], []
        for one in cells:
            job, config = known.get(one.run_id), self._configs[one.run_id]
            number, row, alive = self._history.newest(one.run_id)
            if job:
                self._job_of[one.run_id] = job
            if job in queue or alive:
                busy.append(one)
                continue
            if job and (row is None or row["job_id"] != job):
                self._settle(config, job, number, row is None)
                self._history.refresh()
            if not cell.has_row(config, self._history):
                new.append(one)
        return busy, new

    def submit(self, cells: Sequence[Cell], launcher: Launcher) -> list[str]:
        """Submit cells, as few job arrays as their needs allow. Returns the jobs. Raises ConfigError if SLURM refuses them."""
        groups: dict[Needs, list[Cell]] = {}
        for one in cells:
            groups.setdefault(needs(self._configs[one.run_id], launcher.partition), []).append(one)
        found = []
        for asked in groups:
            most = slurm.nodes(launcher.partition) if asked.nodes > 1 else None
            if most and asked.nodes > most:  # such a job would wait for ever
                where = f"partition {launcher.partition}" if launcher.partition else "the default partition"
                raise ConfigError(
                    "launch.num_hosts", f"{asked.nodes}: {where} has {plural(most, 'node')}; use up to {most}"
                )
        for asked, members in groups.items():
            jobs = launcher.submit([one.overrides for one in members], asked)
            for one, job in zip(members, jobs, strict=True):
                folder = self._results_dir / one.run_id
                folder.mkdir(exist_ok=True)
                attempt.write_json(folder / "job.json", {"job": job, "submitted": time.time()})
                self._job_of[one.run_id] = job
            found += jobs
        return found

    def follow(self, cells: Sequence[Cell], told: Callable[[], Any], finish: Callable[[Cell, cell.Done], None]) -> None:
        """Until every cell has its row, or until told to stop."""
        left = list(cells)
        while left and not told():
            self._history.refresh()
            queue = slurm.queued(self._job_of[one.run_id] for one in left if one.run_id in self._job_of)
            for one in list(left):
                done = self._row(one, queue)
                if done:
                    left.remove(one)
                    finish(one, done)
            if left:
                time.sleep(_POLL_S)

    def left(self, cells: Sequence[Cell]) -> list[str]:
        """The jobs of these cells that wait or run."""
        return list(slurm.queued(self._job_of[one.run_id] for one in cells if one.run_id in self._job_of))

    def _row(self, one: Cell, queue: dict[str, slurm.Job]) -> cell.Done | None:
        """The cell's row, if it has one by now."""
        job = self._job_of.get(one.run_id)
        if job in queue:
            self._gone_since.pop(one.run_id, None)
            return None
        config = self._configs[one.run_id]
        if cell.has_row(config, self._history):
            return cell.Done(cell.Do.run, self._history.row(one.run_id, self._history.latest_number(one.run_id)))
        number, row, alive = self._history.newest(one.run_id)
        if row and job and row.get("job_id") == job:
            return cell.Done(cell.Do.run, row)  # of a status that the same command tries again
        gone = self._gone_since.setdefault(one.run_id, time.monotonic())
        if alive and not job:
            return None
        if time.monotonic() - gone < _LATE_S:
            return None
        return cell.Done(cell.Do.run, self._settle(config, job or "", number, row is None))

    def _settle(self, config: Config, job: str, number: int, unfinished: bool) -> dict[str, Any]:
        """Write the row of a job that ended without one, with what its ranks had reported."""
        status, word = slurm.ended_as(job) if job else ("error", "")
        log = self._log(job)
        if log and _OVER_MEMORY.search((self._results_dir / log).read_text(errors="replace")):
            status = "oom_host"  # without cgroups SLURM says FAILED
        said = f"SLURM ended job {job} as {word}" if word else f"job {job} ended and left no row"
        if status == "oom_host":
            said += "; give it more memory, as in hydra.launcher.mem_gb=200"
        if number and unfinished:
            claimed = attempt.folder_of(self._results_dir, run_id(config), number), number
        else:
            claimed = attempt.claim(self._results_dir, run_id(config))
        return parent.lost(config, claimed, status, said, job=job or None, log=log).row

    def _log(self, job: str) -> str | None:
        """What the job printed to stderr, SLURM's own words among it; relative to the results folder."""
        path = Path("jobs") / job / f"{job}_0_log.err"
        return str(path) if job and (self._results_dir / path).is_file() else None


def refused(error: Exception) -> LdftError:
    """The line for what sbatch or submitit said."""
    text = str(getattr(error, "stderr", "") or error)
    lines = [line.partition("sbatch: error: ")[2].strip() for line in text.splitlines() if "sbatch: error: " in line]
    reason = "; ".join(lines) or " ".join(text.split())
    if _NO_CLUSTER.search(reason):
        return ConfigError(
            "hydra.launcher", f"no SLURM cluster answers here: {reason}; start it on one of its machines"
        )
    return ConfigError(
        "hydra.launcher", f"SLURM takes no job like this: {reason}; correct partition, account, time, memory or GPUs"
    )
