"""Many rows: read 10,000, the newest 300 as loose files, into one DataFrame.

    python benchmarks/results_scale.py [--rows 10000] [--loose 300] [--uncompacted]

The rows follow the schema, with every column filled as by a run, in all statuses. --uncompacted also times the folder before its
first compaction, with one file per row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldft import results
from ldft.config import Config, run_id, series_id, to_dict
from ldft.config.root import flatten
from ldft.results import schema, store
from ldft.results.history import History

STATUSES = ["ok"] * 14 + ["error", "timeout", "oom_device", "oom_host", "skipped", "invalid"]


def synthetic_row(seed: int) -> dict[str, Any]:
    """A row like a real run's: random samples, four NUMA nodes, the whole config."""
    draw = random.Random(seed)
    config = Config()
    config.train.seed = seed
    config.seq_len.tokens = 1024 << draw.randrange(8)
    status = draw.choice(STATUSES)
    times = [draw.uniform(1, 2) for _ in range(5 if status == "ok" else 2)]
    values: dict[str, Any] = {}
    for field in schema.schema():
        if field.name.startswith("cfg."):
            continue
        if pa.types.is_floating(field.type):
            values[field.name] = draw.uniform(0, 100)
        elif pa.types.is_integer(field.type):
            values[field.name] = draw.randrange(1000)
        elif field.type == pa.string():
            values[field.name] = f"{field.name} {draw.randrange(20)}"
        elif field.type == pa.list_(pa.float64()):
            values[field.name] = times
        elif pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type):
            parts = field.type.value_type
            values[field.name] = [
                {part.name: node if pa.types.is_integer(part.type) else "x" if part.type == pa.string() else draw.uniform(0, 99)
                 for part in parts if pa.types.is_integer(part.type) or part.type in (pa.string(), pa.float64())}
                for node in range(4)
            ]  # fmt: skip
    return values | {
        "run_id": run_id(config),
        "attempt": 1,
        "series_id": series_id(config),
        "status": status,
        "started_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=seed),
        "config_json": json.dumps(to_dict(config)),
        "deepspeed_config_json": json.dumps(to_dict(config)),
        **{f"cfg.{key}": value for key, value in flatten(config).items()},
    }


def timed(what: str, work: Callable[[], Any], limit_s: float | None = None) -> Any:
    """Run `work` and print its time: the best of three if it can be repeated."""
    start = time.perf_counter()
    value = work()
    took = time.perf_counter() - start
    goal = f"   (limit {limit_s:g} s: {'met' if took <= limit_s else 'MISSED'})" if limit_s else ""
    print(f"{what:58s} {took:8.2f} s{goal}", flush=True)
    return value


def write(folder: Path, first: int, last: int) -> None:
    """Write loose rows as runs do, but without waiting for the disk each time."""
    every = schema.schema()
    for seed in range(first, last):
        values = synthetic_row(seed)
        attempt_dir = folder / values["run_id"] / "attempt-1"
        attempt_dir.mkdir(parents=True)
        table = pa.Table.from_pylist([{name: values.get(name) for name in every.names}], schema=every)
        pq.write_table(table, attempt_dir / schema.ROW_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time reading and compacting many rows.")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--loose", type=int, default=300)
    parser.add_argument(
        "--uncompacted", action="store_true", help="also read all of them from one file per row (takes a minute)"
    )
    arguments = parser.parse_args()
    print(f"{arguments.rows} rows of {len(schema.schema())} columns; {platform.processor() or platform.machine()}, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, pyarrow {pa.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ldft-scale-") as name:
        folder = Path(name)
        compacted = arguments.rows - arguments.loose
        timed("write the rows, a file each", lambda: write(folder, 0, compacted))
        if arguments.uncompacted:
            timed("read them before any compaction", lambda: results.read(folder))
        timed(f"compact {compacted} rows", lambda: store.compact(folder))
        write(folder, compacted, arguments.rows)
        frame = timed(f"read all, {arguments.loose} of them loose", lambda: results.read(folder), limit_s=5)
        assert len(frame) == arguments.rows and frame["run_id"].is_unique
        history = History(folder)
        timed("a sweep's first look at the folder", history.refresh)
        timed("each later look", history.refresh)
        size = sum(path.stat().st_size for path in store.merged_files(folder)) / arguments.rows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{size:.0f} bytes a compacted row; peak memory of this process {peak:.1f} GiB")


if __name__ == "__main__":
    main()
