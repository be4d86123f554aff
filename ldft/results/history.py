"""The runs in a results folder: their rows, loose or compacted, and the attempts without a row yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldft.results import attempt
from ldft.results.schema import ROW_FILE
from ldft.results.store import Reader, keys

OOM = ("oom_device", "oom_host")

# The columns that sweep decisions and views need.
COLUMNS = [
    "run_id",
    "attempt",
    "job_id",
    "series_id",
    "sweep",
    "repeat",
    "started_at",
    "duration_s",
    "status",
    "error_type",
    "error_message",
    "log_path",
    "tokens_per_s",
    "nodes",
    "peak_host_gib",
    "git_commit",
    "git_dirty",
    "source_hash",
    "cfg.model.name",
    "cfg.seq_len.tokens",
    "cfg.numa.name",
]

Row = dict[str, Any]


class History:
    """The rows of a results folder by run and attempt. `refresh` reads new files only."""

    def __init__(self, results_dir: Path) -> None:
        self.results_dir = results_dir
        self._reader = Reader(results_dir, COLUMNS)
        self._of_file: dict[Path, dict[tuple[str, int], Row]] = {}
        self._rows: dict[str, dict[int, Row]] = {}

    @property
    def unreadable(self) -> dict[Path, str]:
        """Unreadable files, with the reason."""
        return self._reader.unreadable

    def refresh(self) -> None:
        """Read the files that are new since the last call."""
        tables = self._reader.tables()
        blank = dict.fromkeys(COLUMNS)  # files of an older schema version lack some columns
        for path, table in tables.items():
            if path not in self._of_file:
                rows = [blank | row for row in table.to_pylist()]
                self._of_file[path] = dict(zip(keys(table), rows, strict=True))
        self._of_file = {path: self._of_file[path] for path in tables}
        self._rows = {}
        for found in self._of_file.values():
            for (run_id, number), row in found.items():
                self._rows.setdefault(run_id, {})[number] = row

    def row(self, run_id: str, number: int) -> Row | None:
        """The row of one attempt, or None."""
        return self._rows.get(run_id, {}).get(number)

    def latest_number(self, run_id: str) -> int:
        """Number of the newest attempt with a row; 0 if there is none."""
        return max(self._rows.get(run_id, {}), default=0)

    def latest_rows(self) -> list[Row]:
        """The newest row of every run."""
        return [rows[max(rows)] for rows in self._rows.values()]

    def num_loose(self) -> int:
        """Number of rows stored as loose files."""
        return sum(path.name == ROW_FILE for path in self._of_file)

    def newest(self, run_id: str) -> tuple[int, Row | None, bool]:
        """A run's newest attempt: its number (0: none), its row if it has one, and whether a process is working on it.

        Use this for decisions, not `refresh`: it checks for claim and row in the order in which they are created.
        """
        claimed = max(attempt.numbers(self.results_dir, run_id), default=0)
        self.refresh()
        number = max(claimed, self.latest_number(run_id))
        row = self.row(run_id, number)
        if number == 0 or row:
            return number, row, False
        if attempt.is_alive(attempt.folder_of(self.results_dir, run_id, number)):
            return number, None, True
        # Its process may have written the row and ended between the two checks.
        self.refresh()
        return number, self.row(run_id, number), False

    def out_of_memory(self, series_id: str, tokens: int) -> Row | None:
        """Of the runs of a series whose newest attempt ran out of memory, the shortest, if shorter than `tokens`."""
        found = [
            row
            for row in self.latest_rows()
            if row["series_id"] == series_id and row["status"] in OOM and row["cfg.seq_len.tokens"] < tokens
        ]
        return min(found, key=lambda row: row["cfg.seq_len.tokens"], default=None)
