"""The folder of one attempt: claiming it, and the small JSON files that pass between parent, ranks and onlookers.

results/<run_id>/attempt-<n>/
    config.json      the resolved config (parent, before the ranks start)
    started.json     host, pid and start of the parent; its modification time is the heartbeat
    rank-<r>.json    what rank r has so far (rank, after each phase and iteration)
    worker-<r>.log   everything the rank printed
    row.parquet      the row (parent, last)
Everything but the logs appears whole, by rename.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from ldft.errors import ConfigError


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that readers see whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or an empty dict where there is none yet."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return value


def claim(results_dir: Path, run_id: str) -> tuple[Path, int]:
    """Make the next free attempt folder of a run; making it is the claim. Returns the folder and its number."""
    run_dir = results_dir / run_id
    try:
        run_dir.mkdir(exist_ok=True)
        number = 1 + max((int(p.name.removeprefix("attempt-")) for p in run_dir.glob("attempt-*")), default=0)
        while True:
            folder = run_dir / f"attempt-{number}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
        started = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_json(folder / "started.json", started)
    except OSError as error:
        raise ConfigError("results.dir", f"cannot write in {results_dir} ({error.strerror}); choose another") from None
    return folder, number


def rank_report(folder: Path, rank: int) -> dict[str, Any]:
    """The last partial result of a rank; empty where it has not reported."""
    return read_json(folder / f"rank-{rank}.json")
