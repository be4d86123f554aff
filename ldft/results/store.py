"""Files of rows: one file per new row, larger files after compaction.

results/<run_id>/attempt-<n>/row.parquet   a loose row, as the run wrote it
results/rows-<time>-<host>-<pid>.parquet          merged rows; their loose files have been removed

A file never changes once it has its name. A row is identified by (run_id, attempt). It may be in two files for a while, since a
merged file appears before the files that it replaces are removed; readers count it once.
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

from ldft import files
from ldft.errors import ResultsError
from ldft.results import intact, places, rewritten
from ldft.results.schema import ROW_FILE, schema

# Merged files with fewer rows are merged again, so that their number stays small.
_ROWS_OF_A_FULL_FILE = 10_000
_ATTEMPTS_TO_READ = 100


def write_row(row: dict[str, Any], path: Path) -> None:
    """Write one row to `path` atomically. Columns missing from `row` are null.

    Raises ResultsError if the file cannot be written; nothing is left behind.
    """
    target = schema()
    unknown = sorted(row.keys() - set(target.names))
    assert not unknown, f"columns without a schema entry: {unknown}"
    table = pa.Table.from_pylist([{name: row.get(name) for name in target.names}], schema=target)
    try:
        with files.replacing(path, sync=True) as file:
            # Dictionaries, statistics and compression help only files with many rows: without them, a file of one row has half the
            # size and takes a third of the time.
            pq.write_table(table, file, use_dictionary=False, write_statistics=False, compression="none")
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {error.strerror}; free space or choose another results.dir"
        ) from error


def merged_files(results_dir: Path) -> list[Path]:
    """Files with compacted rows."""
    return places.merged(results_dir)


def loose_files(results_dir: Path) -> list[Path]:
    """Files with one row, ordered by run and attempt. Fast for thousands of runs, unlike a glob."""
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
    """Reads a results folder, or one run or file of it, repeatedly if needed: no file is read twice.

    columns: the columns to read (None: all). unreadable: file -> what is wrong with it.
    """

    def __init__(self, results_dir: Path, columns: list[str] | None = None) -> None:
        self.results_dir = results_dir
        self.unreadable: dict[Path, str] = {}
        self._columns = columns
        self._of_one_run: bool | None = None
        self._seen: dict[Path, pa.Table] = {}
        full = schema()
        self._schema = full if columns is None else pa.schema([full.field(name) for name in columns], full.metadata)
        self._united = self._schema

    def _load(self, path: Path) -> pa.Table | None:
        if path not in self._seen and path not in self.unreadable:
            by = ""
            try:
                # For a file of one row, threads cost more than they save.
                with pq.ParquetFile(path) as file:
                    table = file.read(columns=self._columns, use_threads=path.name != ROW_FILE)
                    by = rewritten.writer(file.schema_arrow, file.metadata.created_by or "")
                intact.check(table, "run_id", "attempt")
                # Column types never change between versions, so ldft did not write a file whose types differ.
                if not table.schema.equals(self._united):
                    table = rewritten.restored(table, self._schema)
                    self._united = pa.unify_schemas([self._united, table.schema], promote_options="permissive")
                self._seen[path] = table
            except FileNotFoundError:
                raise
            except intact.DAMAGE as error:
                said = f"; {by} wrote it again: restore ldft's own file" if by else ""
                self.unreadable[path] = " ".join(str(error).split()) + said
        return self._seen.get(path)

    def tables(self) -> dict[Path, pa.Table]:
        """The table in each readable file. A row may be in two of them."""
        if not self.results_dir.exists():
            raise ResultsError(f"{self.results_dir} is not a folder; name the results.dir of a run")
        if self._of_one_run is None:
            self._of_one_run = places.of_one_run(self.results_dir) is not None
        if self._of_one_run:
            found = self.load(places.of_one_run(self.results_dir) or [])
            if self.results_dir in self.unreadable:
                raise ResultsError(f"{self.results_dir} contains no rows: {self.unreadable[self.results_dir]}")
            return found
        # A compaction that ends meanwhile removes files after its merged file has appeared. If the merged files are the same before
        # and after, and no file disappeared during the read, then no row was missed.
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
        raise ResultsError(
            f"{self.results_dir}: its files change too fast to read them; try again when fewer runs are writing"
        )

    def load(self, files: list[Path]) -> dict[Path, pa.Table]:
        """The table in each of `files` that is readable. Raises FileNotFoundError if one is gone."""
        return {path: table for path in files if (table := self._load(path)) is not None}

    def read(self) -> pa.Table:
        """All rows, each once, with the columns of every schema version, in the order in which the runs started."""
        return self.unite(self.tables())

    def unite(self, tables: dict[Path, pa.Table]) -> pa.Table:
        """One table from several, with each row once."""
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
    """All rows of a results folder, or of one run or file of it. Unreadable files, and rows further down, are named on stderr."""
    reader = Reader(Path(results_dir), columns)
    table = reader.read()
    for path, problem in reader.unreadable.items():
        print(f"ldft: skipped unreadable {path}: {problem}", file=sys.stderr)
    if not len(table) and not reader.unreadable and places.below(reader.results_dir):
        print(f"ldft: {places.missing(Path(results_dir))}", file=sys.stderr)
    elif len(table) and (told := places.left_out(reader.results_dir)):
        print(f"ldft: {told}", file=sys.stderr)
    return table


@contextmanager
def _only_one(results_dir: Path) -> Iterator[bool]:
    """Whether this process is the only one compacting this folder. Two would lose nothing, but would merge the same rows twice.

    Raises ResultsError if this cannot be determined: a file system without locks, or another user's lock.
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
            raise ResultsError(f"cannot lock {path}: {error.strerror}; rows stay in separate files") from error
        yield alone


def compact(results_dir: Path) -> int:
    """Merge all loose rows, small merged files and those that another program wrote again into one new file, with ldft's types.
    Returns the number of loose rows merged.

    Safe with concurrent writers and readers, and if the process dies: the merged file is written, read back and found complete
    before the files that it replaces are removed. Raises ResultsError if it cannot be written or the folder cannot be locked.
    """
    if places.of_one_run(results_dir) is not None:
        folder = places.results_dir(results_dir)
        raise ResultsError(f"{results_dir} is one run of {folder}; compact the whole folder")
    with _only_one(results_dir) as alone:
        if not alone:
            return 0
        for left_over in results_dir.glob(".rows-*.tmp"):
            left_over.unlink()
        target_types = schema()
        merged = {path: _rows_and_types(path) for path in merged_files(results_dir)}
        # Other programs' types are changed back: DuckDB reads no maps where one file has lists of pairs in their place.
        foreign = {path for path, (_, types) in merged.items() if rewritten.differs(types, target_types)}
        small = [path for path, (rows, _) in merged.items() if rows < _ROWS_OF_A_FULL_FILE or path in foreign]
        loose = loose_files(results_dir)
        if not loose and len(small) < 2 and not foreign:
            return 0
        reader = Reader(results_dir)
        tables = reader.load(small + loose)
        for path, problem in reader.unreadable.items():
            print(f"ldft: left unreadable {path} where it is: {problem}", file=sys.stderr)
        if not tables:
            return 0
        united = reader.unite(tables)
        target = results_dir / f"rows-{time.time_ns()}-{files.writer()}.parquet"
        _write(united, target)
        if set(keys(pq.ParquetFile(target).read(columns=["run_id", "attempt"]))) != set(keys(united)):
            raise ResultsError(f"{target} does not contain what was written to it; nothing was removed")
        for path in tables:
            path.unlink()
        return sum(path in tables for path in loose)


def _rows_and_types(path: Path) -> tuple[int, pa.Schema]:
    try:
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows), file.schema_arrow
    except intact.DAMAGE:
        return _ROWS_OF_A_FULL_FILE, pa.schema([])  # unreadable: reported by readers, never touched


def _write(table: pa.Table, target: Path) -> None:
    try:
        with files.replacing(target, sync=True) as file:
            pq.write_table(table, file)
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise ResultsError(f"cannot write {target}: {error.strerror}; nothing was removed") from error
