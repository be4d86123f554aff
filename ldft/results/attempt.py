"""The folder of one attempt: claiming it, and the small JSON files through which parent, ranks and ldft.status communicate.

results/<run_id>/attempt-<n>/
    started.json     who claimed the attempt: host, process and its start, job; its modification time is the heartbeat
    config.json      the resolved config (parent, before the ranks start)
    deepspeed.json   the effective DeepSpeed config (parent, before the ranks start)
    choices.json     what the parent chose by the machine's memory (likewise)
    host-<h>.json    state of host h, if there are several (its agent, every few seconds)
    rank-<r>.json    partial results of rank r (rank, after each phase and iteration)
    worker-<r>.log   everything the rank printed
    trace.parquet    samples over time (parent, when the ranks have ended)
    row.parquet      the row (parent, last)
All files except the logs are written atomically, by rename.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldft import batch, files, proc
from ldft.errors import ConfigError

# If a process cannot be looked up from here and its heartbeat is older than this, it counts as dead.
HEARTBEAT_DEAD_S = 300.0
HEARTBEAT_S = 10.0
DEEPSPEED, CHOICES = "deepspeed.json", "choices.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with files.replacing(path) as file:
        file.write(json.dumps(value).encode())


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; an empty dict if it does not exist yet."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return value


def _process_start(pid: int) -> str | None:
    """Start time of a process, unique together with its pid. None if it has ended."""
    found = proc.stat(pid)
    return str(found.start) if found else None


def _here() -> str:
    """The scope in which a pid is valid: this boot of this kernel and this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # some containers hide it
        boot = socket.gethostname()
    return boot + str(Path("/proc/self/ns/pid").readlink())


def owner() -> dict[str, Any]:
    """The content of started.json for this process."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "here": _here(),
        "pid": pid,
        "pid_start": _process_start(pid),
        "time": time.time(),
        "job": batch.job_id(),
        "restarts": batch.restarts(),
    }


def is_alive(folder: Path) -> bool:
    """Whether the process that claimed an attempt is still working on it."""
    try:
        started = read_json(folder / "started.json")
        beat = (folder / "started.json").stat().st_mtime
    except OSError:
        return False
    job = batch.job_id()
    if job and started.get("job") == job and started["restarts"] < batch.restarts():
        return False  # requeued: an earlier start of the very job that asks
    if started.get("here") == _here():
        return bool(_process_start(started["pid"]) == started["pid_start"])
    return time.time() - beat < HEARTBEAT_DEAD_S


def beat(folder: Path) -> None:
    """Update the heartbeat of an attempt."""
    os.utime(folder / "started.json")


@contextmanager
def beating(folder: Path) -> Iterator[None]:
    """Update the heartbeat from a thread while the block runs something long that cannot do so itself.

    Not for a block that starts processes: they are forked, and the thread may hold a lock at that moment.
    """
    ended = threading.Event()

    def go() -> None:
        while not ended.wait(HEARTBEAT_S):
            beat(folder)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def numbers(results_dir: Path, run_id: str) -> list[int]:
    """The attempts of a run, in order."""
    try:
        names = [path.name for path in (results_dir / run_id).iterdir()]
    except FileNotFoundError:
        return []
    found = (name.removeprefix("attempt-") for name in names if name.startswith("attempt-"))
    return sorted(int(number) for number in found if number.isdigit())


def folder_of(results_dir: Path, run_id: str, number: int) -> Path:
    return results_dir / run_id / f"attempt-{number}"


def try_claim(results_dir: Path, run_id: str, number: int) -> Path | None:
    """Claim exactly this attempt: return its folder, or None if another process has it.

    The process that decided to run the cell saw attempts up to number - 1. Claiming exactly this number makes decision and claim
    one step: if several processes decide the same, one gets the attempt and the others decide again. The folder appears by
    rename with started.json inside, so that no process sees a claim without an owner.
    """
    run_dir = results_dir / run_id
    unfinished = run_dir / f".claim-{files.writer()}"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        write_json(unfinished / "started.json", owner())
        try:
            # Renaming onto an empty folder would succeed, but an attempt's folder is never empty.
            unfinished.rename(folder_of(results_dir, run_id, number))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            shutil.rmtree(unfinished)
            return None
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigError("results.dir", f"cannot write in {results_dir} ({error.strerror}); choose another") from None
    return folder_of(results_dir, run_id, number)


def claim(results_dir: Path, run_id: str) -> tuple[Path, int]:
    """Claim the next free attempt of a run, even if others are running. Returns its folder and number."""
    while True:
        number = 1 + max(numbers(results_dir, run_id), default=0)
        folder = try_claim(results_dir, run_id, number)
        if folder:
            return folder, number


def rank_report(folder: Path, rank: int) -> dict[str, Any]:
    """The last partial results of a rank; empty if it has not reported."""
    return read_json(folder / f"rank-{rank}.json")
