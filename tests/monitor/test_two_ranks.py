"""A run of two ranks from start to end: what the monitor shows beside it, and the trace that it leaves, agree with its row."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from ldft.monitor import trace
from tests.conftest import FAST, Done

PHASES = ["start", "imports", "operators", "rendezvous", "model", "checkpoint_buffers", "engine", "train", "teardown"]


@dataclass(slots=True)
class Watched:
    """A run that has ended, and what the monitor said of it meanwhile."""

    done: Done
    samples: list[dict[str, Any]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    (folder / "results").mkdir()
    words = ["--json", "--interval", "0.2", "--results", str(folder / "results")]
    with (folder / "seen").open("w") as file:
        watching = subprocess.Popen([sys.executable, "-m", "ldft.monitor", *words], stdout=file)
    run = [sys.executable, "-m", "ldft", *FAST, "launch.num_ranks=2", "train.iterations=60", "monitor.interval_s=0.2"]
    ended = subprocess.run(
        [*run, f"results.dir={folder / 'results'}"], capture_output=True, text=True, cwd=folder, check=False
    )
    time.sleep(1.5)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=30) == 130
    assert ended.returncode == 0, ended.stdout + ended.stderr
    samples = [json.loads(line) for line in (folder / "seen").read_text().splitlines()]
    return Watched(Done(ended.returncode, ended.stdout, ended.stderr, folder / "results"), samples)


def test_two_ranks_seen_while_they_run_are_what_their_row_says(watched: Watched) -> None:
    samples, row = watched.samples, watched.done.row
    assert samples[-1]["runs"] == [], "a run that has ended is not shown"
    # One rank may end before the other, and is no longer shown then.
    complete = [sample["runs"][0] for sample in samples if sample["runs"] and len(sample["runs"][0]["ranks"]) == 2]
    seen = [run for run in complete if run["iteration"] >= 2]
    assert seen[-1]["phase"] in ("train", "teardown") and seen[-1]["folder"].endswith(f"{row.run_id}/attempt-1")
    mine = {(rank["rank"], e["role"], e["node"]): e["size"] for rank in seen[-1]["ranks"] for e in rank["roles"]}
    assert mine == {(e["rank"], e["role"], e["node"]): round(e["bytes"] * e["share"]) for e in row.roles}
    # While they trained: at the end, memory is freed between the row's reading and the monitor's.
    trained = [run for run in seen if run["phase"] == "train"]
    total = sum(entry["size"] for rank in trained[-1]["ranks"] for entry in rank["memory"])
    assert total / 2**30 == pytest.approx(sum(node["total_gib"] for node in row.nodes), rel=0.05)
    assert seen[-1]["tokens_per_s"] == pytest.approx(row.tokens_per_s, rel=5)
    phases = dict.fromkeys(sample["runs"][0]["phase"] for sample in samples if sample["runs"])
    assert {"imports", "train"} <= set(phases)


def by_rank_and_role(entries: list[dict]) -> dict[tuple[int, str], int]:
    """Bytes, all nodes together; entries of the row say the whole size at every node."""
    return {(entry["rank"], entry["role"]): entry["bytes"] for entry in entries}


def test_a_run_leaves_its_samples_and_they_agree_with_its_row(watched: Watched) -> None:
    done, row = watched.done, watched.done.row
    assert row.status == "ok", done.stdout
    first, last = (
        [str(round(float(time_s), 4)) for time_s in part] for part in (row.iteration_s[1:6], row.iteration_s[-5:])
    )
    listed = f"[{', '.join([*first, '...', *last])}] (59 iterations; the row has all)\n"
    assert f"[RESULT] Each Iteration Latency (rank0): {listed}" in done.stdout
    path = done.results_dir / row.trace_path
    assert path.name == trace.TRACE_FILE and path.parent.name == "attempt-1" and path.parent.parent.name == row.run_id
    samples = pq.read_table(path).to_pylist()
    took_s = (samples[-1]["time"] - samples[0]["time"]).total_seconds()
    assert took_s > 0.8 * (row.duration_s - row.parent_s) and len(samples) <= took_s / 0.2 + 2
    phases = [sample["phase"] for sample in samples]
    assert phases == sorted(phases, key=PHASES.index) and {"imports", "train"} <= set(phases)
    iterations = [sample["iteration"] for sample in samples]
    assert iterations == sorted(iterations) and 0 < iterations[-1] <= 60

    updated = {sample["iteration"]: sample["update_s"] for sample in samples if sample["update_s"] is not None}
    assert len(updated) > 2
    assert updated == {i: pytest.approx(sum(row.update_s[:i]), rel=1e-5) for i in updated}

    trained = [sample for sample in samples if sample["phase"] == "train" and sample["iteration"] > 0]
    # One rank may end before the other, and is no longer in the samples then.
    last = [sample for sample in trained if {entry["rank"] for entry in sample["roles"]} == {0, 1}][-1]
    assert by_rank_and_role(last["roles"]) == by_rank_and_role(row.roles)
    for entry in last["roles"]:
        (same,) = [e for e in row.roles if all(e[name] == entry[name] for name in ("rank", "role", "node"))]
        assert entry["bytes"] == pytest.approx(same["bytes"] * same["share"], abs=1)
    # Memory hardly grows after the first iteration.
    for entry in row.nodes:
        mine = sum(e["mib"] for e in last["memory"] if e["node"] == entry["node"])
        assert mine / 1024 == pytest.approx(entry["total_gib"], rel=0.05)
    assert {entry["rank"] for sample in trained for entry in sample["ranks"]} == {0, 1}
    busy = [entry["cores_busy"] for sample in trained for entry in sample["ranks"]]
    assert max(busy) > 0.1 and all(0 <= value < 64 for value in busy)
    assert all(sample["devices"] == [] for sample in samples)


def test_a_trace_says_what_its_columns_are_and_duckdb_reads_it(watched: Watched) -> None:
    done = watched.done
    path = done.results_dir / done.row.trace_path
    schema = pq.read_schema(path)
    assert schema.metadata[b"ldft.trace_schema_version"] == b"1"
    assert schema.metadata[b"run_id"].decode() == done.row.run_id and schema.metadata[b"interval_s"] == b"0.2"
    for column in trace.COLUMNS:
        described = schema.field(column.name).metadata
        assert described == {b"unit": column.unit.encode(), b"description": column.description.encode()}
    found = duckdb.execute(
        f"select epoch(time), phase, unnest(memory, recursive := true) from read_parquet('{path}')"
    ).fetchall()
    # A process that was started just now may have no whole MiB yet.
    assert found and all(len(line) == 5 and line[4] >= 0 for line in found)
    # Nor one that is ending just now.
    assert [line[4] for line in found if line[1] == "train"][-1] > 0
