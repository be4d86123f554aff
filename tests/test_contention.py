"""benchmarks/contention.py: rates counted over exactly the update's time, on an invented device whose rates are known; and the real
update on this CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.test_benchmarks import FOLDER, run


@pytest.fixture
def contention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import contention

    return contention


class Device:
    """Streams that run one piece after another, each as long as it says; times are those of perf_counter."""

    def __init__(self) -> None:
        self.ends: dict[Any, float] = {}
        self.stream: Any = "default"

    def add(self, seconds: float) -> None:
        """A piece of work on the current stream."""
        self.ends[self.stream] = max(time.perf_counter(), self.ends.get(self.stream, 0.0)) + seconds

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def synchronize(self) -> None:
        time.sleep(max(0.0, max(self.ends.values(), default=0.0) - time.perf_counter()))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            at = 0.0

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any = "default") -> None:
                self.at = max(time.perf_counter(), device.ends.get(stream, 0.0))

            def query(self) -> bool:
                return time.perf_counter() >= self.at

            def synchronize(self) -> None:
                device.synchronize()

            def elapsed_time(self, other: Event) -> float:
                assert other.query(), "read before it has ended"
                return 1e3 * (other.at - self.at)

        for name, value in {
            "Event": Event,
            "Stream": object,
            "stream": self.on,
            "synchronize": self.synchronize,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_what_is_done_by_a_moment_has_the_piece_in_progress_in_part(contention) -> None:
    ends = [1.0, 2.0, 4.0]
    assert [contention.done_by(ends, moment) for moment in (0.0, 1.0, 1.5, 3.0, 9.0)] == [0, 0, 0.5, 1.5, 2]
    assert contention.thread_counts(16) == [16, 15, 14, 12, 8]
    assert contention.thread_counts(2) == [2, 1]


@pytest.mark.parametrize("threads", [0, 1])
def test_streams_beside_an_update_have_the_rates_of_the_device(contention, monkeypatch, threads: int) -> None:
    device = Device()
    device.install(monkeypatch)
    streams = {
        # Queued so far ahead that the device does not wait, even if this process has one core.
        "h2d": contention.Stream(lambda number: device.add(10e-3), 0.5, 10),  # 50 GB/s
        "kernels": contention.Stream(lambda number: device.add(5e-3), 1.5, 20),  # 300 TFLOP/s
    }
    state = contention.State(20_000_000, pin=False)
    options = SimpleNamespace(settle=0.02, least=0.1, nice=10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = contention.sample(streams, ("kernels", "h2d"), state, threads, options)
    assert found["h2d_gb_per_s"] == pytest.approx(50, rel=0.1)
    assert found["kernels_tflop_per_s"] == pytest.approx(300, rel=0.1)
    assert found["d2h_gb_per_s"] is None and found["worst_gap_ms"] > 0
    if threads:
        assert found["update_gb_per_s"] == pytest.approx(0.56 / found["seconds"])
        assert float(state.weights.abs().max()) > 0 and torch.equal(state.copy, state.weights.bfloat16())
    else:
        assert found["update_gb_per_s"] is None and found["seconds"] >= 0.1


def test_every_stream_runs_alone_too(contention) -> None:
    turns = contention.combinations(True, [16, 15])
    assert ((), 0) not in turns and (("kernels",), 0) in turns and ((), 15) in turns
    assert len(set(turns)) == len(turns) == 8 * 3 - 1
    python = [(("python",), count) for count in (2, 1, 0)]
    assert contention.combinations(False, [2, 1]) == [((), 2), ((), 1), *python]


def test_without_a_gpu_the_update_is_measured_alone_and_beside_python(tmp_path: Path) -> None:
    out = tmp_path / "contention.parquet"
    said = run("contention.py", out, "--parameters", "3e7", "--rounds", "3", "--threads", "2", "1", "--note", "a test")
    rows = pq.read_table(out).to_pylist()
    one = [("nothing", 2), ("nothing", 1), ("python", 2), ("python", 1), ("python", 0)]
    assert [(row["beside"], row["threads"]) for row in rows] == one + one[::-1] + one
    for row in rows:
        assert row["note"] == "a test" and row["kernel"] and row["parameters"] == 3e7
        assert row["update_gb_per_s"] == (pytest.approx(0.84 / row["seconds"]) if row["threads"] else None)
        assert (
            (row["python_calls_per_s"] or 0) > 100 if row["beside"] == "python" else row["python_calls_per_s"] is None
        )
    lines = said.splitlines()
    assert lines[-1].startswith("15 samples: ") and "update, GB/s" in said and "copies" not in said
