"""A process's line in /proc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stat:
    """The part of /proc/PID/stat that is used here."""

    parent: int
    ticks: int
    """CPU time in clock ticks, user and system, including children that have ended and were waited for."""
    start: int
    """Start time, clock ticks since boot: unique together with the pid."""


def stat(pid: int) -> Stat | None:
    """None for a process that has ended, waited for or not, or that cannot be looked up from here."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The process name, in parentheses, may itself contain parentheses and spaces.
    values = text.rpartition(")")[2].split()
    if len(values) < 20 or values[0] in "ZX":
        return None
    return Stat(parent=int(values[1]), ticks=sum(map(int, values[11:15])), start=int(values[19]))
