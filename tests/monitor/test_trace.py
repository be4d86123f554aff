"""trace.parquet: what a run leaves of its memory over time, in every outcome, small, and never in the way of the row."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ldft.monitor import trace
from ldft.monitor.sampler import Sampler
from ldft.monitor.samples import Sample
from ldft.monitor.trace import TRACE_FILE, Recorder
from ldft.results import schema
from ldft.runner import parent
from tests.synthetic_samples import machine

PHASES = ["start", "imports", "operators", "rendezvous", "model", "checkpoint_buffers", "engine", "train", "teardown"]


def by_rank_and_role(entries: list[dict]) -> dict[tuple[int, str], int]:
    """Bytes, all nodes together; entries of the row say the whole size at every node."""
    return {(entry["rank"], entry["role"]): entry["bytes"] for entry in entries}


def test_a_run_leaves_its_samples_and_they_agree_with_its_row(ldft) -> None:
    done = ldft("launch.num_ranks=2", "train.iterations=30", "monitor.interval_s=0.2")
    row = done.row
    assert row.status == "ok", done.stdout
    path = done.results_dir / row.trace_path
    assert path.name == TRACE_FILE and path.parent.name == "attempt-1" and path.parent.parent.name == row.run_id
    samples = pq.read_table(path).to_pylist()
    took_s = (samples[-1]["time"] - samples[0]["time"]).total_seconds()
    assert took_s > 0.8 * (row.duration_s - row.parent_s) and len(samples) <= took_s / 0.2 + 2
    phases = [sample["phase"] for sample in samples]
    assert phases == sorted(phases, key=PHASES.index) and {"imports", "train"} <= set(phases)
    iterations = [sample["iteration"] for sample in samples]
    assert iterations == sorted(iterations) and 0 < iterations[-1] <= 30

    trained = [sample for sample in samples if sample["phase"] == "train" and sample["iteration"] > 0]
    assert by_rank_and_role(trained[-1]["roles"]) == by_rank_and_role(row.roles)
    for entry in trained[-1]["roles"]:
        (same,) = [e for e in row.roles if all(e[name] == entry[name] for name in ("rank", "role", "node"))]
        assert entry["bytes"] == pytest.approx(same["bytes"] * same["share"], abs=1)
    # Reading of numa_maps while the ranks train is rare, and memory hardly grows then.
    for entry in row.nodes:
        mine = sum(e["mib"] for e in trained[-1]["memory"] if e["node"] == entry["node"])
        assert mine / 1024 == pytest.approx(entry["total_gib"], rel=0.25)
    assert {entry["rank"] for sample in trained for entry in sample["ranks"]} == {0, 1}
    busy = [entry["cores_busy"] for sample in trained for entry in sample["ranks"]]
    assert max(busy) > 0.1 and all(0 <= value < 64 for value in busy)
    assert all(sample["devices"] == [] for sample in samples)


def test_a_trace_says_what_its_columns_are_and_duckdb_reads_it(ldft) -> None:
    done = ldft()
    path = done.results_dir / done.row.trace_path
    schema = pq.read_schema(path)
    assert schema.metadata[b"ldft.trace_schema_version"] == b"1"
    assert schema.metadata[b"run_id"].decode() == done.row.run_id and schema.metadata[b"interval_s"] == b"1"
    for column in trace.COLUMNS:
        described = schema.field(column.name).metadata
        assert described == {b"unit": column.unit.encode(), b"description": column.description.encode()}
    found = duckdb.execute(
        f"select epoch(time), phase, unnest(memory, recursive := true) from read_parquet('{path}')"
    ).fetchall()
    assert found and all(len(line) == 5 and line[4] > 0 for line in found)


def test_interval_zero_leaves_no_trace(ldft) -> None:
    done = ldft("monitor.interval_s=0")
    assert done.row.status == "ok" and pd.isna(done.row.trace_path)
    assert list(done.results_dir.rglob("*trace*")) == []
    assert schema.schema().field("trace_path").metadata[b"description"].startswith(b"trace.parquet")


@pytest.fixture(scope="module")
def many() -> list[Sample]:
    noise = random.Random(0)
    return [machine(noise, number) for number in range(10_000)]


def test_ten_thousand_samples_are_less_than_a_mebibyte(many, tmp_path) -> None:
    path = tmp_path / TRACE_FILE
    with path.open("wb") as file:
        trace.write(many, file, {})
    assert path.stat().st_size < 1 << 20
    table = pq.read_table(path)
    assert table.num_rows == 10_000
    # Nothing is lost on the way but the rounding that the units say.
    kept, sample = table.slice(1234, 1).to_pylist()[0], many[1234]
    rank = sample.runs[0].ranks[1]
    assert kept["iteration"] == 41 and [entry["node"] for entry in kept["nodes"]] == [0, 1, 2, 3]
    assert [e["used_mib"] for e in kept["nodes"]] == [(node.total - node.free) >> 20 for node in sample.nodes]
    assert [e["mib"] for e in kept["memory"] if e["rank"] == 1] == [size >> 20 for _, size in rank.memory]
    assert [e["bytes"] for e in kept["roles"] if e["rank"] == 1] == [use.size for use in rank.roles]
    assert kept["devices"][1]["pcie_tx_mb_per_s"] == rank.device.pcie_tx_kb_per_s // 1000


def test_a_long_run_keeps_its_whole_length_in_bounded_memory(many, tmp_path) -> None:
    folder = tmp_path / "run" / "attempt-1"
    folder.mkdir(parents=True)
    recorder = Recorder(folder, 1.0)
    second = 0.0
    while second < 3 * len(many):
        recorder.add(many[int(second) % len(many)])
        second += recorder.interval_s
    path, notes = recorder.write()
    table = pq.read_table(path)
    assert 5_000 <= table.num_rows <= trace.MOST_SAMPLES and notes == []
    assert pq.read_schema(path).metadata[b"interval_s"] == b"4"
    assert table["time"][0].as_py().timestamp() == pytest.approx(many[0].time, abs=0.001)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs to mount a small file system (root)")
    folder = disk / "run" / "attempt-1"
    folder.mkdir(parents=True)
    yield folder
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, leave: int) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"x" * 4096)
        except OSError:
            filler.truncate(filler.tell() - leave)


def test_a_trace_for_which_the_disk_has_no_room_is_a_note(small_disk, many) -> None:
    recorder = Recorder(small_disk, 1.0)
    for sample in many[:3000]:
        recorder.add(sample)
    fill(small_disk, leave=16 << 10)
    path, notes = recorder.write()
    assert path is None and notes == ["no trace: cannot write trace.parquet: No space left on device"]
    assert sorted(found.name for found in small_disk.iterdir()) == ["filler"]


def test_a_row_for_which_a_trace_leaves_no_room_is_written(small_disk) -> None:
    (small_disk / TRACE_FILE).write_bytes(b"x" * (300 << 10))
    fill(small_disk, leave=16 << 10)
    row = {"run_id": "run", "attempt": 1, "trace_path": f"run/attempt-1/{TRACE_FILE}", "notes": ["a note"]}
    parent._write(row, small_disk)
    (kept,) = pq.read_table(small_disk / schema.ROW_FILE).to_pylist()
    assert kept["trace_path"] is None and kept["notes"][0] == "a note" and "make room for the row" in kept["notes"][1]
    assert sorted(found.name for found in small_disk.iterdir()) == ["filler", "row.parquet"]


def test_a_bug_in_sampling_is_shown_and_noted_and_the_run_goes_on(tmp_path, monkeypatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    shown = []
    monkeypatch.setattr(Sampler, "sample", broken)
    monkeypatch.setattr(threading, "excepthook", lambda about: shown.append(about.exc_type))
    recorder = Recorder(tmp_path, 0.05)
    with recorder.sampling([1]):
        time.sleep(0.2)
    assert shown == [ZeroDivisionError]
    assert recorder.write() == (None, ["the trace ends early: sampling hit an internal error, shown on stderr"])
