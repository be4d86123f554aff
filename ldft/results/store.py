"""Rows in files: one file a row while they are new, bigger files once they are compacted.

results/<run_id>/attempt-<n>/row.parquet   a loose row, as the run wrote it
results/rows-<time>-<pid>.parquet          rows that were merged; their loose files are gone

A file never changes under its name. A row is (run_id, attempt), and may for a while lie in two files, since a merged file
appears before what it replaces goes: readers count it once.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldft.errors import ResultsError
from ldft.results.schema import ROW_FILE, schema

# Merged files with fewer rows are merged again, so that their number stays small.
_ROWS_OF_A_FULL_FILE = 10_000
_ATTEMPTS_TO_READ = 100


def write_row(row: dict[str, Any], path: Path) -> None:
    """Write one row to `path`, whole or not at all. Columns that are missing in `row` are null.

    Raises ResultsError when the file cannot be written; nothing is left behind then.
    """
    target = schema()
    unknown = sorted(row.keys() - set(target.names))
    assert not unknown, f"columns without a schema entry: {unknown}"
    table = pa.Table.from_pylist([{name: row.get(name) for name in target.names}], schema=target)
    # The temporary name is hidden and has no parquet suffix: no reader's pattern finds it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # What helps many rows is a burden to a file of one: half the size and a third of the time without it.
            pq.write_table(table, file, use_dictionary=False, write_statistics=False, compression="none")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResultsError(
            f"cannot write {path}: {error.strerror}; free space or choose another results.dir"
        ) from error


def merged_files(results_dir: Path) -> list[Path]:
    """Files of compacted rows."""
    return sorted(results_dir.glob("rows-*.parquet"))


def loose_files(results_dir: Path) -> list[Path]:
    """Files of one row, in the order of run and attempt. Quick on thousands of runs, which a glob is not."""
    found = []
    with os.scandir(results_dir) as runs:
        for run in runs:
            if run.name.startswith(".") or not run.is_dir():
                continue
            with os.scandir(run.path) as attempts:
                paths = [f"{entry.path}/{ROW_FILE}" for entry in attempts if entry.name.startswith("attempt-")]
            found += [path for path in paths if os.access(path, os.F_OK)]
    return [Path(path) for path in sorted(found)]


class Reader:
    """Reads a results folder, again and again if need be: files that it has seen are not read twice.

    columns: the only ones to read; none given is all of them. `unreadable` tells what was wrong with which file.
    """

    def __init__(self, results_dir: Path, columns: list[str] | None = None) -> None:
        self.results_dir = results_dir
        self.unreadable: dict[Path, str] = {}
        self._columns = columns
        self._seen: dict[Path, pa.Table] = {}
        full = schema()
        self._schema = full if columns is None else pa.schema([full.field(name) for name in columns], full.metadata)
        self._united = self._schema

    def _load(self, path: Path) -> pa.Table | None:
        if path not in self._seen and path not in self.unreadable:
            try:
                # Threads cost more than they save on a file of one row.
                table = pq.ParquetFile(path).read(columns=self._columns, use_threads=path.name != ROW_FILE)
                # Types are never changed from version to version; a file that clashes is none of ours.
                if not table.schema.equals(self._united):
                    self._united = pa.unify_schemas([self._united, table.schema], promote_options="permissive")
                if not {"run_id", "attempt"} <= set(table.column_names):
                    raise pa.ArrowInvalid("it has no columns run_id and attempt")
                self._seen[path] = table
            except FileNotFoundError:
                raise
            except (OSError, pa.ArrowException) as error:
                self.unreadable[path] = " ".join(str(error).split())
        return self._seen.get(path)

    def tables(self) -> dict[Path, pa.Table]:
        """What each readable file holds. A row may be in two of them."""
        if not self.results_dir.is_dir():
            raise ResultsError(f"{self.results_dir} is not a folder; name the results.dir of a run")
        # A compaction that ends meanwhile takes files away, after its merged file appeared: if the merged files are the same
        # before and after, and no file went missing under our hands, then no row was missed.
        for attempt in range(_ATTEMPTS_TO_READ):
            merged = merged_files(self.results_dir)
            try:
                tables = self.load(merged + loose_files(self.results_dir))
            except FileNotFoundError:
                time.sleep(0.01 * attempt)
                continue
            if merged_files(self.results_dir) == merged:
                self._seen = tables
                return tables
        raise ResultsError(f"{self.results_dir}: its files come and go too fast to read it")

    def load(self, files: list[Path]) -> dict[Path, pa.Table]:
        """What each readable one of some files holds. Raises FileNotFoundError where one is gone."""
        return {path: table for path in files if (table := self._load(path)) is not None}

    def read(self) -> pa.Table:
        """All rows, columns of every schema version united, each row once, in the order in which the runs started."""
        return self.unite(self.tables())

    def unite(self, tables: dict[Path, pa.Table]) -> pa.Table:
        """One table of several, each row once."""
        united = pa.concat_tables([self._united.empty_table(), *tables.values()], promote_options="permissive")
        return _each_once(united).replace_schema_metadata(self._schema.metadata)


def _each_once(table: pa.Table) -> pa.Table:
    first: dict[tuple[str, int], int] = {}
    for index, key in enumerate(keys(table)):
        first.setdefault(key, index)
    wanted = list(first.values())
    if "started_at" in table.column_names:
        started = table["started_at"].cast(pa.int64()).to_pylist()
        wanted.sort(key=lambda index: started[index] or 0)
    return table if wanted == list(range(len(table))) else table.take(wanted)


def keys(table: pa.Table) -> list[tuple[str, int]]:
    """The identities of a table's rows: (run_id, attempt)."""
    return list(zip(table["run_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))


def read_table(results_dir: str | Path, columns: list[str] | None = None) -> pa.Table:
    """All rows of a results folder. Unreadable files are named on stderr."""
    reader = Reader(Path(results_dir), columns)
    table = reader.read()
    for path, problem in reader.unreadable.items():
        print(f"ldft: skipped unreadable {path}: {problem}", file=sys.stderr)
    return table


@contextmanager
def _only_one(results_dir: Path) -> Iterator[bool]:
    """Whether we are the only one who compacts this folder. Two would lose nothing, but merge the same rows twice.

    Raises ResultsError where that cannot be known: a file system without locks, or another user's lock.
    """
    path = results_dir / ".compact.lock"
    with ExitStack() as held:
        alone = True
        try:
            lock = held.enter_context(path.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError as error:
            raise ResultsError(f"cannot lock {path}: {error.strerror}; rows stay in files of their own") from error
        yield alone


def compact(results_dir: Path) -> int:
    """Merge every loose row, and merged files that are small, into one new file. Returns the number of loose rows merged.

    Safe at any moment against writers, readers and its own death: the merged file is on disk, read back and found complete
    before anything that it replaces is removed. Raises ResultsError where it cannot be written, or the folder not be locked.
    """
    with _only_one(results_dir) as alone:
        if not alone:
            return 0
        for left_over in results_dir.glob(".rows-*.tmp"):
            left_over.unlink()
        small = [path for path in merged_files(results_dir) if _num_rows(path) < _ROWS_OF_A_FULL_FILE]
        loose = loose_files(results_dir)
        if not loose and len(small) < 2:
            return 0
        reader = Reader(results_dir)
        tables = reader.load(small + loose)
        for path, problem in reader.unreadable.items():
            print(f"ldft: left unreadable {path} where it is: {problem}", file=sys.stderr)
        if not tables:
            return 0
        united = reader.unite(tables)
        target = results_dir / f"rows-{time.time_ns()}-{os.getpid()}.parquet"
        _write(united, target)
        if set(keys(pq.ParquetFile(target).read(columns=["run_id", "attempt"]))) != set(keys(united)):
            raise ResultsError(f"{target} does not hold what was written to it; nothing was removed")
        for path in tables:
            path.unlink()
        return sum(path in tables for path in loose)


def _num_rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return _ROWS_OF_A_FULL_FILE  # unreadable: reported by readers, never touched


def _write(table: pa.Table, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target)
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResultsError(f"cannot write {target}: {error.strerror}; nothing was removed") from error
