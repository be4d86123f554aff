"""Where rows are looked for and how many places are named; which types of other programs hold a row's values."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from ldft.results import places, rewritten, store
from ldft.results.schema import ROW_FILE


def row(folder: Path, attempt: int = 1) -> Path:
    file = folder / "0123456789ab" / f"attempt-{attempt}" / ROW_FILE
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_rows_are_looked_for_three_folders_down_and_no_further(tmp_path: Path) -> None:
    top = tmp_path / "top"
    row(top / "a" / "b" / "c")
    assert places.below(top) == [top / "a" / "b" / "c"]
    assert places.below(tmp_path) == []
    (top / "rows-1.parquet").touch()  # in the folder itself: not below it
    row(top / ".hidden")
    assert places.below(top) == [top / "a" / "b" / "c"]
    (top / "a" / "rows-1.parquet").touch()
    assert places.below(top) == [top / "a"]


def test_three_folders_are_named_and_the_others_counted(tmp_path: Path) -> None:
    assert places.further_down(tmp_path) == ""
    for name in "abc":
        row(tmp_path / name)
    three = f"are further down: name one of {tmp_path}/a, {tmp_path}/b, {tmp_path}/c"
    assert places.further_down(tmp_path) == three
    row(tmp_path / "d")
    row(tmp_path / "e")
    assert places.further_down(tmp_path) == f"{three} and 2 more"
    assert places.missing(tmp_path) == f"no rows in {tmp_path}; they {three} and 2 more"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert places.missing(empty) == f"no rows in {empty}; python -m ldft writes one per run"
    row(empty / "a" / "b" / "c" / "d" / "e")
    assert places.missing(empty) == f"no rows in {empty} or 3 folders below it; name a folder further down"


def test_why_there_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "all.parquet").touch()
    told = f"no rows in {tmp_path}; all.parquet is not named rows-*.parquet, so it is read only if you name it"
    assert places.missing(tmp_path) == told
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert f"; gone is a link to {tmp_path}/nowhere, which is not there: restore that folder" in places.missing(
        tmp_path
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "rows-1.parquet").touch()
    assert places.missing(empty) == f"no rows in {empty}: its file has none; name the results.dir of a run"


def test_rows_beside_and_below_those_that_are_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write_row({"run_id": "0123456789ab", "attempt": 1}, row(tmp_path))
    assert len(store.read_table(tmp_path)) == 1 and capsys.readouterr().err == ""
    store.write_row({"run_id": "0123456789ac", "attempt": 1}, row(tmp_path / "sub"))
    (tmp_path / "all.parquet").touch()
    assert len(store.read_table(tmp_path)) == 1
    assert capsys.readouterr().err == (
        f"ldft: {tmp_path}: not read: all.parquet is not named rows-*.parquet, so it is read only if you name it; "
        f"more rows are further down: name one of {tmp_path}/sub\n"
    )


def test_attempts_of_a_run_come_in_their_order(tmp_path: Path) -> None:
    files = [row(tmp_path, attempt) for attempt in (10, 9, 1)]
    run = files[0].parents[1]
    assert places.of_one_run(run) == files[::-1]
    assert places.of_one_run(files[0]) == places.of_one_run(files[0].parent) == [files[0]]
    assert places.of_one_run(tmp_path) is None
    for path in (run, *files, files[0].parent, tmp_path):
        assert places.results_dir(path) == tmp_path
    merged = tmp_path / "rows-1.parquet"
    merged.touch()
    assert places.results_dir(merged) == tmp_path


TEXTS = pa.map_(pa.string(), pa.string())
NODE = pa.struct([("node", pa.int16()), ("gib", pa.float64())])


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        (pa.null(), TEXTS, True),
        (pa.int64(), pa.float64(), True),
        (pa.float32(), pa.int32(), True),
        (pa.bool_(), pa.int32(), False),
        (pa.string(), pa.int32(), False),
        (pa.large_string(), pa.string(), True),
        (pa.dictionary(pa.int32(), pa.string()), pa.string(), True),
        (pa.dictionary(pa.int32(), pa.int64()), pa.string(), False),
        (pa.timestamp("us"), pa.timestamp("ms", tz="UTC"), True),
        (pa.int64(), pa.timestamp("ms", tz="UTC"), False),
        (pa.large_list(pa.int64()), pa.list_(pa.float64()), True),
        (pa.list_(pa.string()), pa.list_(pa.float64()), False),
        (pa.float64(), pa.list_(pa.float64()), False),
        (pa.struct([("node", pa.int64())]), NODE, True),
        (pa.struct([("node", pa.string()), ("gib", pa.float64())]), NODE, False),
        (pa.struct([]), NODE, False),
        (pa.int64(), NODE, False),
        (pa.map_(pa.large_string(), pa.large_string()), TEXTS, True),
        (pa.map_(pa.int32(), pa.string()), TEXTS, False),
        (pa.map_(pa.string(), pa.int32()), TEXTS, False),
        (pa.list_(pa.list_(pa.string())), TEXTS, True),
        (pa.list_(pa.list_(pa.int32())), TEXTS, False),
        (pa.list_(pa.null()), TEXTS, True),
        (pa.list_(pa.string()), TEXTS, False),
        (pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())])), TEXTS, True),
        (pa.list_(pa.struct([("key", pa.int32()), ("value", pa.string())])), TEXTS, False),
        (pa.list_(pa.struct([("key", pa.string()), ("value", pa.int32())])), TEXTS, False),
        (pa.list_(pa.struct([("key", pa.string())])), TEXTS, False),
        (pa.struct([("a", pa.string())]), TEXTS, False),
    ],
    ids=str,
)
def test_a_type_holds_a_rows_values_or_not(found: pa.DataType, wanted: pa.DataType, fits: bool) -> None:
    table = pa.table({"x": pa.array([None], type=found)})
    target = pa.schema([("x", wanted)])
    assert rewritten.differs(table.schema, target)
    if fits:
        assert rewritten.restored(table, target).to_pydict() == {"x": [None]}
        assert rewritten.restored(table, target).schema.equals(target)
    else:
        with pytest.raises(pa.ArrowInvalid, match=r"^column x has the type .*: ldft did not write it$"):
            rewritten.restored(table, target)


def test_columns_of_other_names_stay_and_pandas_index_goes() -> None:
    table = pa.table({"own": [1.5], "__index_level_0__": [7], "__index_level_x__": [8], "x": [2.0]})
    target = pa.schema([("x", pa.int32())])
    restored = rewritten.restored(table, target)
    assert restored.to_pylist() == [{"own": 1.5, "__index_level_x__": 8, "x": 2}]
    assert not rewritten.differs(restored.schema, target)
    assert rewritten.restored(pa.table({"x": [float("nan")]}), target).to_pylist() == [{"x": None}]
    with pytest.raises(pa.ArrowInvalid, match=r"^2\.5 is not a whole number$"):
        rewritten.restored(pa.table({"x": [2.5]}), target)


def test_who_wrote_a_file_again() -> None:
    plain = pa.schema([("x", pa.int32())])
    assert rewritten.writer(plain.with_metadata({"pandas": "{}"}), "parquet-cpp-arrow") == "pandas"
    assert rewritten.writer(plain, "DuckDB version v1") == "DuckDB" and rewritten.writer(plain, "polars") == "Polars"
    assert rewritten.writer(plain, "parquet-cpp-arrow version 26") == ""
