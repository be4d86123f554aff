"""Reading and compacting rows: none lost, none counted twice, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldft import results
from ldft.config import run_id
from ldft.errors import ResultsError
from ldft.results import schema, store
from ldft.sweep import loop, plan
from tests.synthetic import config, leave


def seeds(folder: Path) -> list[int]:
    return results.read(folder)["cfg.train.seed"].astype(int).tolist()


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    for seed in range(10):
        leave(tmp_path, config(train__seed=seed), tokens_per_s=float(seed))
    return tmp_path


def test_compaction_keeps_every_row_and_value(ten) -> None:
    before = results.read(ten)
    assert store.compact(ten) == 10
    assert store.loose_files(ten) == [] and len(store.merged_files(ten)) == 1
    assert results.read(ten).equals(before)
    leave(ten, config(train__seed=10))
    assert store.compact(ten) == 1
    assert len(store.merged_files(ten)) == 1, "small merged files are merged again"
    assert sorted(seeds(ten)) == list(range(11))
    assert store.compact(ten) == 0


def test_a_second_attempt_is_a_row_of_its_own(tmp_path) -> None:
    leave(tmp_path, config(), 1, "error")
    store.compact(tmp_path)
    leave(tmp_path, config(), 2, "ok")
    assert results.read(tmp_path)[["attempt", "status"]].values.tolist() == [[1, "error"], [2, "ok"]]


class Died(BaseException):
    pass


@pytest.mark.parametrize("step", ["write_table", "rename", "unlink"])
def test_a_death_in_the_middle_of_compaction_loses_and_doubles_nothing(ten, monkeypatch, step) -> None:
    def die(*arguments: object, **options: object) -> None:
        raise Died

    calls = []

    def die_at_the_fourth(self: Path, missing_ok: bool = False) -> None:
        calls.append(self)
        if len(calls) == 4:
            raise Died
        os.unlink(self)  # noqa: PTH108

    with monkeypatch.context() as patch:
        if step == "write_table":
            patch.setattr(pq, "write_table", die)
        elif step == "rename":
            patch.setattr(Path, "replace", die)
        else:
            patch.setattr(Path, "unlink", die_at_the_fourth)
        with pytest.raises(Died):
            store.compact(ten)
    assert sorted(seeds(ten)) == list(range(10))
    store.compact(ten)
    assert sorted(seeds(ten)) == list(range(10))
    assert [path.name for path in ten.iterdir() if path.name.endswith(".tmp")] == []
    query = f"select count(*) from read_parquet('{ten}/**/row*.parquet', union_by_name=true)"
    assert duckdb.execute(query).fetchall() == [(10,)]


@pytest.mark.parametrize("moment", ["before the loose files are listed", "after"])
def test_a_compaction_that_ends_while_a_reader_looks_costs_no_row(ten, monkeypatch, moment) -> None:
    listed = store.loose_files
    calls = []

    def while_we_look(folder: Path) -> list[Path]:
        calls.append(folder)
        if len(calls) > 1:  # compaction lists files too
            return listed(folder)
        before = listed(folder)
        store.compact(folder)
        return listed(folder) if moment.startswith("before") else before

    monkeypatch.setattr(store, "loose_files", while_we_look)
    assert sorted(seeds(ten)) == list(range(10))


def _write_rows(folder: Path, first: int) -> None:
    for seed in range(first, first + 60):
        leave(folder, config(train__seed=seed))


def _compact_on_and_on(folder: Path, until: float) -> None:
    while time.time() < until:
        store.compact(folder)


def test_readers_see_every_row_while_others_write_and_compact(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    until = time.time() + 6
    others = [
        context.Process(target=_write_rows, args=(tmp_path, 0)),
        context.Process(target=_compact_on_and_on, args=(tmp_path, until)),
        context.Process(target=_compact_on_and_on, args=(tmp_path, until)),
    ]
    for other in others:
        other.start()
    seen: list[int] = []
    reader = store.Reader(tmp_path)
    while time.time() < until or others[0].is_alive():
        now = reader.read()["cfg.train.seed"].to_pylist()
        assert len(set(now)) == len(now), "a row was counted twice"
        assert set(seen) <= set(now), "a row was lost"
        seen = now
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert sorted(seeds(tmp_path)) == list(range(60))


def test_old_and_newer_schemas_and_unreadable_files_are_read_together(ten, capsys) -> None:
    store.compact(ten)
    old = leave(ten, config(train__seed=10)) / schema.ROW_FILE
    table = pq.read_table(old)
    pq.write_table(table.drop_columns(["tokens_per_s", "series_id", "cfg.sweep.name"]), old)
    newer = leave(ten, config(train__seed=11)) / schema.ROW_FILE
    pq.write_table(pq.read_table(newer).append_column("column_to_come", pa.array(["x"])), newer)
    clash = leave(ten, config(train__seed=12)) / schema.ROW_FILE
    position = table.column_names.index("status")
    pq.write_table(pq.read_table(clash).set_column(position, "status", pa.array([3])), clash)
    torn = leave(ten, config(train__seed=13)) / schema.ROW_FILE
    torn.write_bytes(torn.read_bytes()[:1000])
    # A byte that is in no text, in a value and in a column's name: parquet itself does not notice.
    no_text = [leave(ten, config(train__seed=seed)) / schema.ROW_FILE for seed in (14, 15)]
    for file, word in zip(no_text, (b"llama", b"tokens_per_s"), strict=True):
        whole = file.read_bytes()
        file.write_bytes(whole.replace(word, word[:-1] + b"\x9a"))
        assert file.read_bytes() != whole

    def check() -> None:
        frame = results.read(ten)
        assert sorted(frame["cfg.train.seed"]) == list(range(12))
        assert frame["column_to_come"].dropna().tolist() == ["x"]
        assert frame.set_index("cfg.train.seed")["tokens_per_s"][9] == 9.0
        said = capsys.readouterr().err
        assert all(str(file) in said for file in (clash, torn, *no_text)) and said.count("\n") == 4

    check()
    assert store.compact(ten) == 2
    capsys.readouterr()
    check()
    assert all(file.exists() for file in (clash, torn, *no_text)), "what cannot be read is not ours to remove"


def test_a_full_disk_is_a_clear_error_and_leaves_earlier_rows_alone(tmp_path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs to mount a small file system (root)")
    try:
        for seed in range(3):
            leave(disk, config(train__seed=seed))
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(b"x" * 4096)
        with pytest.raises(ResultsError, match="No space left on device; free space"):
            store.write_row({"run_id": "x"}, disk / "row.parquet")
        with pytest.raises(ResultsError, match="nothing was removed"):
            store.compact(disk)
        assert seeds(disk) == [0, 1, 2]
        assert [path for path in disk.rglob("*") if path.name.endswith(".tmp")] == []
        (disk / "filler").unlink()
        assert store.compact(disk) == 3
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("problem", [errno.ENOSYS, errno.ENOLCK, errno.EACCES])
def test_a_folder_that_cannot_be_locked_is_not_compacted_and_said_once_a_sweep(
    tmp_path, monkeypatch, capsys, problem
) -> None:
    def unknown(*arguments: object) -> None:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(fcntl, "flock", unknown)
    monkeypatch.setattr(loop, "_COMPACT_AT", 2)
    cells, configs = [], {}
    for seed in range(4):
        one = config(train__seed=seed, train__iterations=0, results__dir=str(tmp_path), sweep__started_at=time.time())
        configs[run_id(one)] = one
        cells.append(plan.Cell(run_id(one), f"seed {seed}", "tiny", 1024, 1, 1024, []))
    assert loop.Sweep(plan.Plan("unlocked", time.time(), "here", cells, configs)).run() == 1
    out = capsys.readouterr().out
    assert out.count("warning: cannot lock") == 1 and os.strerror(problem) in out
    assert "internal error" not in out and sorted(seeds(tmp_path)) == list(range(4))
    with pytest.raises(ResultsError, match="cannot lock"):
        store.compact(tmp_path)


def test_the_documented_duckdb_lines_work_on_loose_and_merged_rows(tmp_path, monkeypatch) -> None:
    node = {
        "host": "h",
        "node": 0,
        "huge_gib": 0.0,
        "heap_gib": 1.0,
        "stack_gib": 0.0,
        "private_gib": 0.0,
        "total_gib": 1.0,
    }
    leave(
        tmp_path / "results",
        config(model__name="tiny", train__seed=1),
        tokens_per_s=5.0,
        nodes=[node, node | {"node": 3}],
    )
    store.compact(tmp_path / "results")
    leave(tmp_path / "results", config(model__name="tiny", train__seed=2), tokens_per_s=7.0)
    leave(tmp_path / "results", config(train__seed=3), 1, "error", error_message="why", log_path="x.log")
    monkeypatch.chdir(tmp_path)
    lines = [line.strip() for line in (results.__doc__ or "").splitlines() if line.strip().endswith(";")]
    database = duckdb.connect()
    answers = [database.execute(line).fetchall() for line in lines]
    assert answers[1] == [("tiny", 1024, 7.0)]
    assert [row[1:] for row in answers[2]] == [("error", "why", "x.log")]
    assert [row[2] for row in answers[3]] == [0, 3]


def test_the_results_command_compacts_and_exports(ten) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "ldft.results", *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    assert command("compact", str(ten)).stdout == "ldft: merged 10 rows\n"
    done = command("export", "--csv", str(ten))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 11 and not done.stderr
    done = command("export", "--csv", str(ten), "-o", "/proc/rows.csv")
    assert done.returncode == 2 and done.stderr.startswith("ldft: cannot write /proc/rows.csv (No such file or"), (
        done.stderr
    )
    done = command("compact", str(ten / "nowhere"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
