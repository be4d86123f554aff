"""The status of a run, from evidence: how the ranks ended, what they reported, the kernel's OOM count, and ldft's own actions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldft import batch
from ldft.runner.launch import RankExit

# SIGUSR2 counts as the job's time limit in its last ten minutes, since users choose how early it comes; SIGTERM, which also tells
# of scancel, only at the very end.
_WARNED_S, _ENDED_S = 600.0, 5.0
OOM_DEVICE, OOM_HOST = "oom_device", "oom_host"


@dataclass(slots=True)
class Verdict:
    status: str
    rank: int = 0
    """The rank that determined the status; its log is the one to read."""
    exit_code: int | None = 0
    signal: str | None = None
    error_type: str | None = None
    error_message: str | None = None


def oom_kills() -> int:
    """Number of processes that the kernel has OOM-killed so far: in this process's memory cgroup (v2 or v1), else on the machine.

    0 if the kernel or the container shows neither.
    """
    for line in _lines(Path("/proc/self/cgroup")):
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            counter = Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
        elif hierarchy == "0" and not controllers:
            counter = Path(f"/sys/fs/cgroup{path}/memory.events")
        else:
            continue
        if counter.is_file():
            return _field(counter, "oom_kill")
    return _field(Path("/proc/vmstat"), "oom_kill")


def _field(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[0] == name), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def stopped(name: str) -> Verdict:
    """The verdict on a run that this signal to ldft ended: timeout if its job's time was up, else interrupted."""
    left = batch.seconds_left()
    # Earlier they tell of preemption.
    if (name == "SIGUSR2" and (left is None or left < _WARNED_S)) or (
        name == "SIGTERM" and left is not None and left < _ENDED_S
    ):
        limit = f"{name} to ldft: its job's time limit; give the job more time, as in hydra.launcher.timeout_min=240"
        return Verdict("timeout", exit_code=None, signal=name, error_message=limit)
    return Verdict("interrupted", exit_code=None, signal=name, error_message=f"{name} to ldft")


def judge(
    exits: list[RankExit],
    reports: list[dict[str, Any]],
    *,
    timed_out_s: float,
    interrupted: str | None,
    new_oom_kills: int,
) -> Verdict:
    """Decide the status.

    exits: in the order in which the ranks ended. reports: the ranks' last partial results, by rank (empty if there is none).
    timed_out_s: the time limit that was exceeded, 0 for none. interrupted: name of the signal that ldft received, if any.
    new_oom_kills: increase of `oom_kills()` during the run.
    """
    if interrupted:
        return stopped(interrupted)
    if timed_out_s:
        passed = f"launch.timeout_s={timed_out_s:g} exceeded; raise it, or use 0 for no limit"
        return Verdict("timeout", exit_code=None, error_message=passed)
    failed = [ended for ended in exits if ended.exit_code != 0 and not ended.ended_by_us]
    if not failed:
        ended = next((one for one in exits if one.exit_code != 0), None)
        if ended is None:
            return Verdict("ok")
        unfinished = f"rank {ended.rank} was ended before it was done, although no rank had failed"
        return Verdict("error", ended.rank, ended.exit_code, ended.signal, error_message=unfinished)
    # Find the cause, not its consequence: if a rank dies, its peers abort or raise a transport exception, sometimes before it ends.
    signalled = next((ended for ended in failed if ended.signal not in (None, "SIGABRT")), None)
    reported = next((ended for ended in failed if reports[ended.rank].get("error_type")), None)
    ended = signalled or reported or failed[0]
    report = reports[ended.rank]
    verdict = Verdict("error", ended.rank, ended.exit_code, ended.signal)
    verdict.error_type, verdict.error_message = report.get("error_type"), report.get("error_message")
    phase = report.get("phase", "start")
    if ended.signal == "SIGKILL" and new_oom_kills > 0:
        verdict.status = OOM_HOST
        verdict.error_message = f"rank {ended.rank} was killed by the kernel for lack of host memory during {phase}"
    elif ended.signal in ("SIGTERM", "SIGINT"):
        verdict.status = "interrupted"
        verdict.error_message = f"rank {ended.rank} was told to stop ({ended.signal}) during {phase}"
    elif ended.signal:
        verdict.error_message = f"rank {ended.rank} died of {ended.signal} during {phase}"
    elif report.get("error_kind"):
        verdict.status = report["error_kind"]
    elif verdict.error_message is None:
        verdict.error_message = f"rank {ended.rank} ended with exit code {ended.exit_code} during {phase}"
    return verdict
