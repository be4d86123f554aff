"""Rows that pandas, polars or DuckDB wrote again, and paths other than a results folder: read with ldft's types, or said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldft import results
from ldft.config import run_id
from ldft.errors import ResultsError
from ldft.results import __main__ as command
from ldft.results import places, schema, store
from ldft.results.history import History
from ldft.sweep import status
from multirun_analysis import __main__ as analysis
from multirun_analysis import load
from tests.synthetic import config, leave

NODE = {
    "host": "h",
    "node": 0,
    "huge_gib": 0.0,
    "heap_gib": 1.0,
    "stack_gib": 0.0,
    "private_gib": 0.5,
    "total_gib": 1.5,
}
ROLE = {"host": "h", "rank": 0, "role": "momentum", "bytes": 7, "node": 1, "share": 1.0, "requested_share": None}
VALUES: dict[str, Any] = {
    "versions": {"torch": "2.13.0", "python": "3.11"},
    "nodes": [NODE, NODE | {"node": 3}],
    "roles": [ROLE],
    "iteration_s": [9.0, 1.5, 1.5],
    "hosts": ["h"],
    "notes": ["a note"],
    "tokens_per_s": 5.0,
    "tokens_per_iteration": 1024,
    "warmup_iterations": 1,
    "skipped_updates": [0, 0, 1],
    "git_dirty": False,
    "cpu": "a CPU",
    "device_type": "cpu",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder with a good row, one without an exit code, and a failed one without measurements."""
    leave(tmp_path / "results", config(train__seed=1), **VALUES)
    leave(tmp_path / "results", config(train__seed=2), **VALUES, exit_code=1)
    leave(tmp_path / "results", config(train__seed=3), 1, "error", error_message="why")
    return tmp_path / "results"


def by_pandas(path: Path) -> None:
    pd.read_parquet(path).to_parquet(path)


def by_pandas_with_an_index(path: Path) -> None:
    frame = pd.read_parquet(path)
    pd.concat([frame, frame.assign(run_id="x")]).query("run_id != 'x'").iloc[[0]].rename(index={0: 5}).to_parquet(path)


def by_pandas_with_floats(path: Path) -> None:
    """What a column of integers with nulls is in pandas."""
    frame = pd.read_parquet(path)
    whole = frame.select_dtypes("integer").columns
    frame.astype(dict.fromkeys(whole, "float64")).to_parquet(path)


def by_duckdb(path: Path) -> None:
    duckdb.execute(f"copy (select * from read_parquet('{path}')) to '{path}.new' (format parquet)")
    Path(f"{path}.new").replace(path)


def as_polars(path: Path) -> None:
    """The types that polars writes: large strings and lists, maps as lists of structs, dictionaries for few values."""

    def larger(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_map(kind):
            return pa.large_list(pa.struct([("key", pa.large_string()), ("value", pa.large_string())]))
        if pa.types.is_list(kind):
            return pa.large_list(larger(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct([(field.name, larger(field.type)) for field in kind])
        return pa.large_string() if pa.types.is_string(kind) else kind

    table = pq.read_table(path)
    columns = {}
    for field in table.schema:
        values = table[field.name].to_pylist()
        if pa.types.is_map(field.type):
            values = [value and [dict(zip(("key", "value"), pair, strict=True)) for pair in value] for value in values]
        columns[field.name] = pa.array(values, type=larger(field.type))
    columns["cpu"] = columns["cpu"].dictionary_encode()
    pq.write_table(pa.table(columns), path)


REWRITERS = [by_pandas, by_pandas_with_an_index, by_pandas_with_floats, by_duckdb, as_polars]


@pytest.mark.parametrize("rewrite", REWRITERS)
def test_a_rewritten_row_is_read_as_ldft_wrote_it(folder: Path, capsys, rewrite: Callable[[Path], None]) -> None:
    before, seen = results.read_table(folder), load(folder)
    for path in store.loose_files(folder)[:2]:  # the other stays as ldft wrote it
        rewrite(path)
    after = results.read_table(folder)
    assert after.schema.equals(schema.schema()) and after.to_pylist() == before.to_pylist()
    again = load(folder)
    pd.testing.assert_frame_equal(again, seen)
    history = History(folder)
    history.refresh()
    assert len(history.latest_rows()) == 3 and history.unreadable == {}
    assert store.compact(folder) == 3
    query = (
        "select versions['torch'], nodes[2].node, exit_code from read_parquet('{}/**/row*.parquet') order by started_at"
    )
    assert duckdb.execute(query.format(folder)).fetchall() == [
        ("2.13.0", 3, None),
        ("2.13.0", 3, 1),
        (None, None, None),
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rewrite", REWRITERS)
def test_compacting_gives_merged_rows_of_another_program_their_types_again(
    folder: Path, monkeypatch, rewrite: Callable[[Path], None]
) -> None:
    before = results.read_table(folder).to_pylist()
    assert store.compact(folder) == 3
    monkeypatch.setattr(store, "_ROWS_OF_A_FULL_FILE", 2)  # a file of this size is otherwise never merged again
    (merged,) = store.merged_files(folder)
    assert store.compact(folder) == 0 and store.merged_files(folder) == [merged]
    if rewrite is by_pandas_with_an_index:  # it keeps one row
        rewrite = by_pandas
    rewrite(merged)
    query = f"select versions['torch'] from read_parquet('{folder}/**/row*.parquet') order by started_at"
    leave(folder, config(train__seed=4), **VALUES)
    if rewrite is not by_duckdb:
        with pytest.raises(duckdb.ConversionException):
            duckdb.execute(query).fetchall()
    store.compact(folder)
    assert duckdb.execute(query).fetchall() == [("2.13.0",), ("2.13.0",), (None,), ("2.13.0",)]
    assert results.read_table(folder).to_pylist()[:3] == before
    left = store.merged_files(folder)
    assert store.compact(folder) == 0 and store.merged_files(folder) == left


def test_several_rows_in_one_file_of_pandas_are_rows(folder: Path, tmp_path: Path) -> None:
    everything = pd.concat([pd.read_parquet(path) for path in store.loose_files(folder)])
    everything.to_parquet(tmp_path / "all.parquet")
    before = results.read_table(folder).to_pylist()
    assert results.read_table(tmp_path / "all.parquet").to_pylist() == before
    everything.to_parquet(tmp_path / "rows-mine.parquet")  # in a folder, under the name of merged rows
    assert results.read_table(tmp_path).to_pylist() == before
    assert load(tmp_path / "all.parquet")["cfg.train.seed"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("status", 3, "column status has the type int64, not string: ldft did not write it; pandas wrote it again"),
        ("versions", "2.13", "column versions has the type"),
        ("nodes", "none", "column nodes has the type"),
        ("warmup_iterations", 1.5, "1.5 is not a whole number"),
    ],
)
def test_what_cannot_be_a_row_is_named_with_who_wrote_it(folder: Path, capsys, column, value, problem) -> None:
    path = store.loose_files(folder)[0]
    frame = pd.read_parquet(path)
    frame[column] = [value]
    frame.to_parquet(path)
    assert len(results.read(folder)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"skipped unreadable {path}: " in said and problem in said


def test_the_folder_or_file_of_a_run_can_be_named(folder: Path) -> None:
    row = folder / run_id(config(train__seed=1)) / "attempt-1" / schema.ROW_FILE
    leave(folder, config(train__seed=1), 2)
    for path, attempts in ((row, [1]), (row.parent, [1]), (row.parents[1], [1, 2])):
        assert results.read(path)["attempt"].tolist() == attempts
        assert load(path)["cfg.train.seed"].tolist() == [1] * len(attempts)
        assert places.results_dir(path) == folder
    assert places.results_dir(folder) == folder
    with pytest.raises(ResultsError, match=f"is one run of {folder}; compact the whole folder"):
        store.compact(row.parents[1])
    assert store.loose_files(folder)


def test_a_trace_is_found_from_any_of_these_paths(tmp_path: Path) -> None:
    attempt = leave(tmp_path, config(), 1, "ok", trace_path=f"{run_id(config())}/attempt-1/trace.parquet")
    (attempt / "trace.parquet").touch()
    for path in (tmp_path, attempt.parent, attempt, attempt / schema.ROW_FILE):
        assert load(path)["trace_file"].tolist() == [str(attempt / "trace.parquet")]


def test_rows_further_down_are_named(folder: Path, capsys, monkeypatch) -> None:
    above = folder.parent
    assert results.read(above).empty
    line = f"no rows in {above}; they are further down: name one of {folder}\n"
    assert capsys.readouterr().err == f"ldft: {line}"
    assert analysis.main([str(above)]) == 2
    assert capsys.readouterr().err == f"ldft: {line}"
    monkeypatch.setattr(sys, "argv", ["ldft.status", str(above)])
    assert status.main() == 2
    said = capsys.readouterr().err
    assert said == f"ldft: {above} contains no sweep; rows are further down: name one of {folder}\n"


def test_an_empty_folder_and_a_file_that_is_none_of_ours(tmp_path: Path, capsys, monkeypatch) -> None:
    assert analysis.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no rows in {tmp_path}; python -m ldft writes one per run\n"
    (tmp_path / "notes.txt").write_text("no rows")
    with pytest.raises(ResultsError, match=r"notes.txt contains no rows: .*[Pp]arquet"):
        results.read(tmp_path / "notes.txt")
    monkeypatch.setattr(sys, "argv", ["ldft.results", "export", "--csv", str(tmp_path / "notes.txt")])
    assert command.main() == 1
    assert "notes.txt contains no rows" in capsys.readouterr().err
