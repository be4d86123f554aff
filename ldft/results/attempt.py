"""The folder of one attempt: claiming it, and the small JSON files that pass between parent, ranks and onlookers.

results/<run_id>/attempt-<n>/
    started.json     who claimed the attempt: host, process and its start; its modification time is the heartbeat
    config.json      the resolved config (parent, before the ranks start)
    deepspeed.json   the effective DeepSpeed config (parent, likewise)
    rank-<r>.json    what rank r has so far (rank, after each phase and iteration)
    worker-<r>.log   everything the rank printed
    trace.parquet    samples over time (parent, when the ranks have ended)
    row.parquet      the row (parent, last)
Everything but the logs appears whole, by rename.
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

from ldft.errors import ConfigError

# A heartbeat that is older than this, of a process that cannot be looked up from here, is that of a dead one.
HEARTBEAT_DEAD_S = 300.0
HEARTBEAT_S = 10.0
DEEPSPEED = "deepspeed.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that readers see whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or an empty dict where there is none yet."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return value


def _process_start(pid: int | str) -> str | None:
    """Start of a process in clock ticks since boot, which with its pid names it for good; None when it has ended."""
    try:
        # The name, in brackets, may itself hold brackets and blanks.
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if values[0] in "ZX" else values[19]


def _here() -> str:
    """The space in which a pid of ours means something: this boot of this kernel, this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # some containers hide it
        boot = socket.gethostname()
    return boot + str(Path("/proc/self/ns/pid").readlink())


def owner() -> dict[str, Any]:
    """What started.json says of this process."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "here": _here(),
        "pid": pid,
        "pid_start": _process_start(pid),
        "time": time.time(),
    }


def is_alive(folder: Path) -> bool:
    """Whether the process that claimed an attempt still works on it."""
    try:
        started = read_json(folder / "started.json")
        beat = (folder / "started.json").stat().st_mtime
    except OSError:
        return False
    if started.get("here") == _here():
        return bool(_process_start(started["pid"]) == started["pid_start"])
    return time.time() - beat < HEARTBEAT_DEAD_S


def beat(folder: Path) -> None:
    """Say that the attempt is still being worked on."""
    os.utime(folder / "started.json")


@contextmanager
def beating(folder: Path) -> Iterator[None]:
    """Say so from a thread, while the block does what may take long and has no moment to.

    Not for a block that starts processes: they are forked, and a thread may hold a lock at that moment.
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
    """Claim exactly this attempt: its folder, or None where somebody else has it.

    Whoever decided that a cell is to run saw attempts up to number - 1. Taking that number and no other makes decision and
    claim one step: of several processes that decided the same, one gets it and the rest look again. The folder appears by
    rename with its owner inside, so that no onlooker meets a claim of nobody.
    """
    run_dir = results_dir / run_id
    unfinished = run_dir / f".claim-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        write_json(unfinished / "started.json", owner())
        try:
            # Renaming onto an empty folder would succeed, but no attempt is ever empty.
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
    """Claim the next free attempt of a run, whoever else works on it. Returns the folder and its number."""
    while True:
        number = 1 + max(numbers(results_dir, run_id), default=0)
        folder = try_claim(results_dir, run_id, number)
        if folder:
            return folder, number


def rank_report(folder: Path, rank: int) -> dict[str, Any]:
    """The last partial result of a rank; empty where it has not reported."""
    return read_json(folder / f"rank-{rank}.json")
