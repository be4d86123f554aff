"""Rows and attempts as runs leave them, without running anything."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldft.config import Config, Device, Precision, run_id, series_id
from ldft.config.root import flatten
from ldft.results import attempt, schema, store


def config(**values: Any) -> Config:
    """A resolved config; values by dotted key, with __ for the dot."""
    made = Config()
    made.launch.device, made.train.precision = Device.cpu, Precision.bf16
    for key, value in values.items():
        *path, last = key.split("__")
        part: Any = made
        for name in path:
            part = getattr(part, name)
        setattr(part, last, value)
    return made


def row(of: Config, number: int = 1, status: str = "ok", **values: Any) -> dict[str, Any]:
    """A row of that config."""
    return {
        "run_id": run_id(of),
        "attempt": number,
        "series_id": series_id(of),
        "status": status,
        "started_at": datetime.now(UTC),
        "duration_s": 10.0,
        "source_hash": "0123456789ab",
        **{f"cfg.{key}": value for key, value in flatten(of).items()},
        **values,
    }


def leave(results_dir: Path, of: Config, number: int = 1, status: str = "ok", **values: Any) -> Path:
    """An attempt that has ended, with its row. Returns its folder."""
    folder = attempt.folder_of(results_dir, run_id(of), number)
    folder.mkdir(parents=True)
    attempt.write_json(folder / "started.json", attempt.owner())
    store.write_row(row(of, number, status, **values), folder / schema.ROW_FILE)
    return folder
