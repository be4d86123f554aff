"""Bandwidth of CPU streams and GPU copies by NUMA node and node set.

Each process is bound to its own cores, like the ranks of a run; its arrays are on the nodes of the set, touched and verified. All
processes of a measurement run concurrently. Rates are bytes over the median time, in GB/s (1e9).
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from ldft.errors import LdftError
from ldft.memory.policy import Placement
from ldft.runner.core_binding import cores_of_ranks
from ldft.terminal import plural

CPU_KERNELS, COPIES = ("read", "write", "triad", "adam"), ("h2d", "d2h")
# Bytes of traffic per byte of one array. Adam reads weight, gradient and two moments and writes all but the gradient: 28 B per
# 4 B parameter. Cache lines that a plain store fetches first are not counted, as in STREAM.
TRAFFIC = {"read": 1, "write": 1, "triad": 3, "adam": 7, "h2d": 1, "d2h": 1}
# Number of arrays per process.
ARRAYS = 4

SCHEMA = pa.schema(
    [
        pa.field("host", pa.string()),
        pa.field("measured_at", pa.string()),
        pa.field(
            "kernel", pa.string(), metadata={"description": "read, write, triad, adam: CPU; h2d, d2h: copies of a GPU"}
        ),
        pa.field("nodes", pa.string()),
        pa.field("weights", pa.string(), metadata={"description": "pages per turn on each node; empty: one node"}),
        pa.field("processes", pa.int64(), metadata={"description": "number of concurrent processes"}),
        pa.field("process", pa.int64()),
        pa.field("cores", pa.int64(), metadata={"description": "cores of this process"}),
        pa.field(
            "array_bytes",
            pa.int64(),
            metadata={"description": "bytes of one array; adam uses four arrays, triad three"},
        ),
        pa.field("elements", pa.int64(), metadata={"description": "fp32 elements of an array: parameters, for adam"}),
        pa.field("traffic_bytes", pa.int64(), metadata={"description": "read and written in one repetition"}),
        pa.field("samples_s", pa.list_(pa.float64())),
        pa.field("median_s", pa.float64()),
        pa.field("gb_per_s", pa.float64(), metadata={"description": "traffic_bytes / median_s / 1e9, of this process"}),
    ]
)


@dataclass(frozen=True, slots=True)
class NodeSet:
    """The nodes over which arrays are spread, and the ratio."""

    nodes: tuple[int, ...]
    weights: tuple[int, ...] = ()

    @property
    def placement(self) -> Placement:
        if len(self.nodes) == 1:
            return Placement(kind="bind", nodes=self.nodes)
        if not self.weights:
            return Placement(kind="interleave", nodes=self.nodes)
        return Placement(kind="weighted_interleave", nodes=self.nodes, weights=self.weights, method="stripes")

    def texts(self) -> tuple[str, str]:
        weights = self.weights or ((1,) * len(self.nodes) if len(self.nodes) > 1 else ())
        return ",".join(map(str, self.nodes)), ":".join(map(str, weights))


class Workers:
    """`count` measuring processes that execute the same commands concurrently."""

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self.cores = [len(cores) for cores in cores_of_ranks(count)]
        for index, cores in enumerate(cores_of_ranks(count)):
            # Started like ranks (runner/launch.py).
            threads = {"OMP_NUM_THREADS": str(len(cores)), "OMP_PROC_BIND": "false", "DS_ACCELERATOR": "cpu"}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "ldft.bench.streams", str(index)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | threads,
                    preexec_fn=partial(os.sched_setaffinity, 0, cores),
                )
            )
        answers = [self._answer(process) for process in self._processes]
        self.gpus = answers[0]["gpus"]

    def ask(self, **command: Any) -> list[dict[str, Any]]:
        """Each process's answer. Raises LdftError where one has ended."""
        for process in self._processes:
            assert process.stdin
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self._processes]

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise LdftError(f"a measuring process ended with code {process.wait()}; its output is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin and process.stdout
            process.stdin.close()
            process.wait()
            process.stdout.close()


@contextmanager
def _workers(count: int) -> Iterator[Workers]:
    """Measuring processes, stopped when the context exits."""
    made = Workers(count)
    try:
        yield made
    finally:
        made.end()


def measure(
    sets: list[NodeSet], sizes: list[int], counts: list[int], kernels: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Rows of SCHEMA, one per process and measurement. Prints a line for each measurement, and for each node set left out for lack
    of memory."""
    rows = []
    common = {"host": socket.gethostname(), "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for count in counts:
        with _workers(count) as group:
            here = [kernel for kernel in kernels if kernel not in COPIES or count <= group.gpus]
            if not here:
                print(
                    f"ldft: {processes(count)}: left out: copies ({', '.join(kernels)}) need one GPU per process, "
                    f"{group.gpus or 'none'} visible",
                    flush=True,
                )
                continue
            for node_set in sets:
                nodes, weights = node_set.texts()
                label = f"nodes {nodes}{f' by {weights}' if weights else ''}, {processes(count)}"
                print(f"ldft: {label}: placing {max(sizes) / 2**20:.0f} MiB x {ARRAYS} each", flush=True)
                placed = group.ask(do="place", placement=_plain(node_set.placement), bytes=max(sizes))
                if refused := next((answer["error"] for answer in placed if "error" in answer), None):
                    print(f"ldft: {label}: left out: {refused}", flush=True)
                    continue
                for size, kernel in itertools.product(sorted(sizes), here):
                    answers = group.ask(do="time", kernel=kernel, bytes=size, repeats=repeats)
                    found = [
                        _row(kernel, size, answer["seconds"])
                        | common
                        | {"nodes": nodes, "weights": weights, "processes": count, "process": index}
                        | {"cores": group.cores[index]}
                        for index, answer in enumerate(answers)
                    ]
                    rows += found
                    total = sum(row["gb_per_s"] for row in found)
                    print(f"ldft:   {kernel:5} {size / 2**20:8.2f} MiB: {total:7.1f} GB/s", flush=True)
    return rows


def processes(count: int) -> str:
    return plural(count, "process", "processes")


def _plain(placement: Placement) -> dict[str, Any]:
    return {name: getattr(placement, name) for name in ("kind", "nodes", "weights", "method")}


def _row(kernel: str, size: int, seconds: list[float]) -> dict[str, Any]:
    median_s = statistics.median(seconds)
    traffic = TRAFFIC[kernel] * size
    return {
        "kernel": kernel,
        "array_bytes": size,
        "elements": size // 4,
        "traffic_bytes": traffic,
        "samples_s": seconds,
        "median_s": median_s,
        "gb_per_s": traffic / median_s / 1e9,
    }
