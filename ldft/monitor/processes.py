"""Processes from /proc: which of them are ldft's ranks, and what they use. Processes that have ended are left out."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldft import proc

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Run:
    """Ranks running one attempt."""

    folder: Path
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parent:
    """A `python -m ldft` process without ranks: it is starting, ending, or between two cells of a sweep."""

    pid: int
    user: str
    command: str
    """The arguments after `python -m ldft`."""
    results_dir: Path | None
    """Its results folder; None if its working directory may not be read."""


def ticks_of_family(pid: int) -> int | None:
    """CPU ticks of a process and, recursively, of the processes that its main thread started; None if it has ended."""
    known = proc.stat(pid)
    if known is None:
        return None
    children = _text(pid, f"task/{pid}/children") or ""
    return known.ticks + sum(ticks_of_family(int(child)) or 0 for child in children.split())


def user_of(pid: int) -> str | None:
    """Name of a process's user, or the user id if it has no name; None if the process has ended."""
    try:
        uid = (PROC / str(pid)).stat().st_uid
    except FileNotFoundError:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def rank_of(pid: int) -> int | None:
    """RANK in the environment of a process; None for another user's."""
    text = _text(pid, "environ")
    for line in (text or "").split("\0"):
        if line.startswith("RANK=") and line[5:].isdigit():
            return int(line[5:])
    return None


def find(results: Path | None = None) -> tuple[list[Run], list[Parent]]:
    """All users' active runs on this machine, by folder; and ldft commands without ranks, by pid.

    results: only those with this results folder.
    """
    ranks: dict[int, Path] = {}
    agents: dict[int, Path] = {}
    commands: dict[int, list[str]] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        words = (_text(pid, "cmdline") or "").split("\0")[:-1]
        if words[1:3] == ["-m", "ldft.worker"] and len(words) == 4:
            if words[3].startswith("/") and Path(words[3]).parents[1:]:  # as ldft names an attempt
                ranks[pid] = Path(words[3])
        elif words[-3:-1] == ["-m", "ldft.runner.agent"]:  # also the srun that starts them
            agents[pid] = Path(words[-1])
        elif words[1:3] == ["-m", "ldft"]:
            commands[pid] = words[3:]
        elif len(words) > 1 and Path(words[1]).name == "ldft" and "python" in Path(words[0]).name:
            commands[pid] = words[2:]
    runs: dict[Path, list[int]] = {}
    busy: set[int] = set()
    for pid, folder in ranks.items():
        known = proc.stat(pid)
        # A process forked by a rank looks like the rank until it executes another program.
        if known is not None and known.parent not in ranks:
            runs.setdefault(folder, []).append(pid)
            busy.update(_ancestors(pid))
    # An agent stands between a command and its ranks; that of a SLURM job is started by the job.
    for pid, folder in agents.items():
        if folder in runs:
            busy.update(_ancestors(pid))
    parents = [found for pid, words in commands.items() if pid not in busy and (found := _parent(pid, words, commands))]
    wanted = [Run(folder, tuple(sorted(pids))) for folder, pids in sorted(runs.items())]
    if results is not None:
        asked = _resolved(results)
        wanted = [run for run in wanted if _resolved(run.folder.parents[1]) == asked]
        parents = [one for one in parents if one.results_dir == asked]
    return wanted, sorted(parents, key=lambda one: one.pid)


def _parent(pid: int, words: list[str], commands: dict[int, list[str]]) -> Parent | None:
    known, user = proc.stat(pid), user_of(pid)
    if known is None or user is None or known.parent in commands:
        return None
    named = [word.removeprefix("results.dir=") for word in words if word.startswith("results.dir=")]
    try:
        folder = _resolved((PROC / str(pid) / "cwd").readlink() / (named[-1] if named else "results"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        folder = None
    return Parent(pid, user, " ".join(words), folder)


def _ancestors(pid: int) -> Iterator[int]:
    """Its parent, that one's parent, and so on."""
    while (known := proc.stat(pid)) is not None and known.parent:
        pid = known.parent
        yield pid


def _resolved(path: Path) -> Path:
    """Without symbolic links. Unlike Path.resolve it takes any name, such as a link to itself: other users choose names here."""
    return Path(os.path.realpath(path))


def _text(pid: int, name: str) -> str | None:
    """A file of a process under /proc; None if the process has ended or may not be read."""
    try:
        return (PROC / str(pid) / name).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
