"""Explains why a set-up program failed: in one line if its output is understood, else with its last lines."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

# 3.1 GiB installed beside 0.6 of downloads, measured with torch for CPUs; CUDA's libraries by the sizes of their wheels.
_NEEDS = "about 4 GiB, or 14 where torch comes with CUDA's libraries"
AGAIN = "then rerun the same command to resume"
_NETWORK = (
    "NewConnectionError|NameResolutionError|Name or service not known|Temporary failure in name resolution|"
    "Network is unreachable|Connection refused|ProxyError|ConnectTimeoutError|ReadTimeoutError|Max retries exceeded"
)


def explain(title: str, output: Iterable[str], venv: Path, log: Path) -> str:
    """One line, followed by the relevant lines of output if ldft has no better explanation."""
    lines = [line for line in output if line.strip()]
    text = "\n".join(lines)
    if re.search("No space left on device|Disk quota exceeded", text):
        free = shutil.disk_usage(venv.parent).free / 2**30
        return (
            f"the disk of {venv} became full; now that pip has removed what it had unpacked, {free:.1f} GiB are free; set-up needs "
            f"{_NEEDS}; make room, or use VENV= with a folder elsewhere, {AGAIN}"
        )
    if refused := re.search("Read-only file system|Permission denied", text):
        return cannot_write(venv, refused[0])
    if re.search(_NETWORK, text):
        return f"no connection to the package index; check the network, and pip's proxy and index (pip config list), {AGAIN}"
    return "\n".join([f"set-up failed at: {title}; all of its output is in {log}. The last lines:", *_relevant(lines)])


def cannot_write(venv: Path, reason: str | None) -> str:
    """The message for a folder that cannot be written."""
    return f"cannot write in {venv} ({reason}); choose a folder that you can write: make run VENV=..."


def _relevant(lines: list[str]) -> list[str]:
    """The compiler's or pip's own errors with a line of context, else the last lines."""
    errors = [number for number, line in enumerate(lines) if re.search(r"\berror:|^ERROR|^\w*Error:", line)]
    if errors:
        return [f"  {line.strip()[:200]}" for line in lines[max(0, errors[0] - 1) :][:10]]
    return [f"  {line.strip()[:200]}" for line in lines[-10:]]
