"""trace.parquet: what a run leaves of its memory over time, in every outcome, small, and never in the way of the row."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from ldft.monitor import trace
from ldft.monitor.sampler import Sampler
from ldft.monitor.samples import Sample
from ldft.monitor.trace import TRACE_FILE, Recorder
from ldft.results import schema
from ldft.runner import parent
from tests.conftest import long
from tests.synthetic_samples import machine


@long
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


def test_samples_of_eight_gpus_are_less_than_two_mebibytes_in_ten_thousand(tmp_path) -> None:
    noise = random.Random(0)
    path = tmp_path / TRACE_FILE
    with path.open("wb") as file:
        trace.write([machine(noise, number, ranks=8) for number in range(2_500)], file, {})
    assert 1 << 18 < path.stat().st_size < 1 << 19, "a quarter of them; two GPUs' would be less than a quarter of a MiB"


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
