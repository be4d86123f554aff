"""trace.parquet: memory and devices of a run over time, one row per sample, taken by the parent while the ranks run.

create view trace as select * from read_parquet('results/RUN_ID/attempt-1/trace.parquet');
select time, phase, unnest(memory, recursive := true) from trace;
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldft import files
from ldft.monitor.processes import Run
from ldft.monitor.sampler import SHARE_WHILE_PREPARING, Sampler
from ldft.monitor.samples import Sample
from ldft.results.schema import Column

SCHEMA_VERSION = 1
TRACE_FILE = "trace.parquet"
# If there are more samples, every second one is dropped and the interval doubles: a week's run keeps one sample per minute.
MOST_SAMPLES = 10_000
_MIB = 1 << 20

_SMALL, _MB, _BYTES, _FLOAT, _TEXT = pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.string()


def _entries(*fields: tuple[str, pa.DataType]) -> pa.DataType:
    return pa.list_(pa.struct(fields))


# Columns are added, never renamed or retyped. docs/columns.md is generated from this list.
COLUMNS = [
    Column("time", pa.timestamp("ms", tz="UTC"), "UTC", "when the sample was taken"),
    Column("phase", pa.string(), "", "phase of rank 0: start, imports, operators, rendezvous, model, checkpoint_buffers, engine, train, teardown"),
    Column("iteration", pa.int32(), "", "completed iterations, including warm-up"),
    Column("update_s", _FLOAT, "s", "time of these iterations in which the fused step's update was in progress, beside the forward pass or within the step; null: another kernel updates"),
    Column("nodes", _entries(("node", _SMALL), ("total_mib", _MB), ("used_mib", _MB), ("page_cache_mib", _MB), ("huge_total_mib", _MB), ("huge_used_mib", _MB)), "MiB", "the whole machine by NUMA node, over all processes: used is all memory that is not free, including page cache; huge: the pool of hugetlb pages"),
    Column("memory", _entries(("rank", _SMALL), ("node", _SMALL), ("mib", _MB)), "MiB", "memory of each rank's process by node, as numastat -p counts it; empty before its first reading and after the rank's end"),
    Column("memory_age_s", _FLOAT, "s", "age of `memory` at the sample: large processes are read less often"),
    Column("roles", _entries(("rank", _SMALL), ("role", _TEXT), ("node", _SMALL), ("bytes", _BYTES)), "bytes", "offloaded tensors by role and node, as verified when their memory was allocated; node is null if unknown (memory.pinning=torch)"),
    Column("ranks", _entries(("rank", _SMALL), ("cores_busy", _FLOAT), ("pinned_bytes", _BYTES)), "", "CPU seconds per second of each rank and its child processes since the previous sample; bytes of its offloaded tensors that are registered with CUDA"),
    Column("devices", _entries(("rank", _SMALL), ("vram_used_mib", _MB), ("vram_total_mib", _MB), ("utilisation_percent", _SMALL), ("pcie_rx_mb_per_s", _MB), ("pcie_tx_mb_per_s", _MB)), "", "each rank's GPU by NVML: memory used by all processes; share of time during which kernels ran; PCIe traffic to (rx) and from (tx) the GPU in MB/s, over 20 ms"),
]  # fmt: skip


def schema(metadata: dict[str, str] | None = None) -> pa.Schema:
    """The trace's schema; unit and description are field metadata."""
    return pa.schema(
        [pa.field(c.name, c.type, metadata={"unit": c.unit, "description": c.description}) for c in COLUMNS],
        metadata={"ldft.trace_schema_version": str(SCHEMA_VERSION), **(metadata or {})},
    )


class Recorder:
    """Samples a run while its ranks run, and writes the trace."""

    def __init__(self, folder: Path, interval_s: float) -> None:
        """interval_s: 0 for no trace."""
        self._folder = folder
        self.interval_s = interval_s
        """Seconds between samples; grows in long runs."""
        self._samples: list[Sample] = []
        self._failed = False

    @contextmanager
    def sampling(self, pids: Iterable[int]) -> Iterator[None]:
        """Sample the ranks with these pids from a thread, so that slow readings do not delay the caller in noticing that a rank has
        ended. Not for a block that forks."""
        if not self.interval_s:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._work, args=(Run(self._folder, tuple(pids)), ended), name="ldft-trace")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _work(self, run: Run, ended: threading.Event) -> None:
        self._failed = True  # reset at the end; the interpreter prints an exception raised here
        sampler = Sampler(SHARE_WHILE_PREPARING)
        due = time.monotonic()
        last = False
        while True:
            sample = sampler.sample([run])
            if sample.runs:  # else all ranks have just ended
                self.add(sample)
            if last:
                break
            due = max(due + self.interval_s, time.monotonic())  # missed times are skipped
            # Then one more sample: ranks that are about to be stopped are still there.
            last = ended.wait(due - time.monotonic())
        self._failed = False

    def add(self, sample: Sample) -> None:
        """Keep a sample."""
        self._samples.append(sample)
        if len(self._samples) > MOST_SAMPLES:
            self._samples = self._samples[::2]
            self.interval_s *= 2

    def write(self) -> tuple[Path | None, list[str]]:
        """Write the samples atomically. Returns the file, if there is one, and notes for the row."""
        notes = ["the trace ends early: sampling hit an internal error, shown on stderr"] if self._failed else []
        if not self._samples:
            short = self.interval_s and not notes
            return None, ["no trace: no rank ran long enough for a sample"] if short else notes
        target = self._folder / TRACE_FILE
        run_id, attempt = self._folder.parent.name, self._folder.name.removeprefix("attempt-")
        described = {"run_id": run_id, "attempt": attempt, "host": socket.gethostname()}
        try:
            with files.replacing(target, sync=True) as file:
                write(self._samples, file, described | {"interval_s": f"{self.interval_s:g}"})
        except OSError as error:
            return None, [*notes, f"no trace: cannot write {TRACE_FILE}: {error.strerror}"]
        return target, notes


def write(samples: list[Sample], file: Any, metadata: dict[str, str]) -> None:
    """Write samples, each of at most one run, as parquet."""
    pq.write_table(
        table(samples, metadata),
        file,
        compression="zstd",
        compression_level=9,
        use_dictionary=True,
        write_statistics=False,
    )


def table(samples: list[Sample], metadata: dict[str, str]) -> pa.Table:
    """Samples, each of at most one run, as a table. Built column by column: a list of dicts would take ten times the memory."""
    ranks = [[rank for run in sample.runs for rank in run.ranks] for sample in samples]
    runs = [sample.runs[0] if sample.runs else None for sample in samples]
    columns: dict[str, list[Any]] = {
        "time": [round(sample.time * 1000) for sample in samples],
        "phase": [run.phase if run else None for run in runs],
        "iteration": [run.iteration if run else None for run in runs],
        "update_s": [run.update_s if run else None for run in runs],
        "memory_age_s": [max((rank.memory_age_s for rank in of), default=None) for of in ranks],
    }
    entries: dict[str, list[list[tuple[Any, ...]]]] = {
        "nodes": [
            [
                (n.node, *(size // _MIB for size in (n.total, n.used, n.page_cache, n.huge_total, n.huge_total - n.huge_free)))
                for n in sample.nodes
            ]
            for sample in samples
        ],
        "memory": [[(r.rank, node, size // _MIB) for r in of for node, size in r.memory or ()] for of in ranks],
        "roles": [[(r.rank, use.role, use.node, use.size) for r in of for use in r.roles] for of in ranks],
        "ranks": [[(r.rank, None if r.cores_busy is None else round(r.cores_busy, 2), r.pinned) for r in of] for of in ranks],
        "devices": [
            [
                (
                    r.rank,
                    _scaled(d.vram_used, _MIB),
                    _scaled(d.vram_total, _MIB),
                    d.utilisation_percent,
                    _scaled(d.pcie_rx_kb_per_s, 1000),
                    _scaled(d.pcie_tx_kb_per_s, 1000),
                )
                for r in of
                if (d := r.device) is not None
            ]
            for of in ranks
        ],
    }  # fmt: skip
    target = schema(metadata)
    arrays = [
        _lists(entries[field.name], field.type) if field.name in entries else pa.array(columns[field.name], field.type)
        for field in target
    ]
    return pa.Table.from_arrays(arrays, schema=target)


def _scaled(value: int | None, unit: int) -> int | None:
    return None if value is None else value // unit


def _lists(entries: list[list[tuple[Any, ...]]], kind: pa.ListType) -> pa.Array:
    """A column of lists of structs."""
    offsets = [0]
    for one in entries:
        offsets.append(offsets[-1] + len(one))
    fields = list(kind.value_type)
    flat = [entry for one in entries for entry in one]
    values = [pa.array([entry[i] for entry in flat], field.type) for i, field in enumerate(fields)]
    structs = pa.StructArray.from_arrays(values, fields=fields)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs, type=kind)
