"""`python -m ldft.bench nodes`: bandwidth of CPU streams and GPU copies by NUMA node and node set.

    python -m ldft.bench nodes                                   measure this machine and save its profile for numa=optimal
    python -m ldft.bench nodes --rows streams.parquet --nodes 0 3 0,3 --weights 1:1 4:1 --sizes 64M 1G --processes 1 2

Each process is bound to cores of its own, as the ranks of a run are; its arrays lie on the nodes of the set, touched and verified.
All processes of a measurement work at the same time. Rates are bytes over the median time, GB/s (1e9).
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldft.errors import ConfigError, LdftError, ResultsError
from ldft.memory import bandwidths
from ldft.memory.limits import free_memory, free_on_node
from ldft.memory.policy import Placement, PlacementError
from ldft.memory.topology import Topology, read_topology
from ldft.runner.core_binding import cores_of_ranks
from ldft.terminal import Parser

CPU_KERNELS, COPIES = ("read", "write", "triad", "adam"), ("h2d", "d2h")
# Bytes of traffic for each byte of one array. Adam reads weight, gradient and two moments and writes all but the gradient: 28 B a
# parameter of 4 B. Cache lines that a plain store fetches first are not counted, as in STREAM.
TRAFFIC = {"read": 1, "write": 1, "triad": 3, "adam": 7, "h2d": 1, "d2h": 1}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# An array of this size is larger than the caches of most machines, and four of them are Adam's.
_LEAST, _MOST = 64 << 20, 1 << 30
# That a process holds.
_ARRAYS = 4

SCHEMA = pa.schema(
    [
        pa.field("host", pa.string()),
        pa.field("measured_at", pa.string()),
        pa.field(
            "kernel", pa.string(), metadata={"description": "read, write, triad, adam: CPU; h2d, d2h: copies of a GPU"}
        ),
        pa.field("nodes", pa.string()),
        pa.field("weights", pa.string(), metadata={"description": "pages a turn on each node; empty: one node"}),
        pa.field("processes", pa.int64(), metadata={"description": "at work at the same time"}),
        pa.field("process", pa.int64()),
        pa.field("cores", pa.int64(), metadata={"description": "of this process"}),
        pa.field("array_bytes", pa.int64(), metadata={"description": "of one array; adam has four, triad three"}),
        pa.field("elements", pa.int64(), metadata={"description": "fp32 elements of an array: parameters, for adam"}),
        pa.field("traffic_bytes", pa.int64(), metadata={"description": "read and written in one repetition"}),
        pa.field("samples_s", pa.list_(pa.float64())),
        pa.field("median_s", pa.float64()),
        pa.field("gb_per_s", pa.float64(), metadata={"description": "traffic_bytes / median_s / 1e9, of this process"}),
    ]
)


@dataclass(frozen=True, slots=True)
class NodeSet:
    """Nodes that arrays are spread over, and in which ratio."""

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
    """So many measuring processes that take the same commands at the same time."""

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self.cores = [len(cores) for cores in cores_of_ranks(count)]
        for index, cores in enumerate(cores_of_ranks(count)):
            # As ranks are started (runner/launch.py).
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
            raise LdftError(f"a measuring process ended with code {process.wait()}; what it said is above")
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
    """Measuring processes, ended at the end of the context."""
    made = Workers(count)
    try:
        yield made
    finally:
        made.end()


def measure(
    sets: list[NodeSet], sizes: list[int], counts: list[int], kernels: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Rows of SCHEMA, one a process and measurement; a line on screen each. Node sets without room are left out with a line."""
    rows = []
    common = {"host": socket.gethostname(), "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for count in counts:
        with _workers(count) as group:
            here = [kernel for kernel in kernels if kernel not in COPIES or count <= group.gpus]
            if not here:
                print(
                    f"ldft: {_processes(count)}: left out: copies ({', '.join(kernels)}) take a GPU a process, "
                    f"{group.gpus or 'none'} visible",
                    flush=True,
                )
                continue
            for node_set in sets:
                nodes, weights = node_set.texts()
                label = f"nodes {nodes}{f' by {weights}' if weights else ''}, {_processes(count)}"
                print(f"ldft: {label}: placing {max(sizes) / 2**20:.0f} MiB x {_ARRAYS} each", flush=True)
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


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


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


def profile(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What later runs read: by node Adam's rate and that of copies, all processes together; as link the best that one gets."""
    by_node: dict[str, dict[str, float]] = {}
    link: dict[str, float] = {}
    largest = max((row["array_bytes"] for row in rows), default=0)
    for row in rows:
        name = {"adam": "cpu"}.get(row["kernel"], row["kernel"])
        if row["array_bytes"] != largest or "," in row["nodes"] or name not in ("cpu", *COPIES):
            continue
        together = [
            other["gb_per_s"]
            for other in rows
            if all(other[key] == row[key] for key in ("kernel", "nodes", "weights", "processes", "array_bytes"))
        ]
        entry = by_node.setdefault(f"node{row['nodes']}", {})
        entry[name] = round(max(entry.get(name, 0.0), sum(together)), 3)
        if name in COPIES:
            link[name] = round(max(link.get(name, 0.0), row["gb_per_s"]), 3)
    bandwidth: dict[str, Any] = dict(by_node)
    if link:
        bandwidth["link"] = link
    return {
        "host": socket.gethostname(),
        "measured_at": rows[0]["measured_at"] if rows else None,
        "bandwidth": bandwidth,
    }


def default_size(topology: Topology) -> int:
    """Bytes of an array: well above the caches, and four of them a sixteenth of what the smallest node has free."""
    free = min([free_on_node(node) or free_memory().bytes for node in topology.memory_nodes] + [free_memory().bytes])
    wanted = min(_MOST, max(4 * _LEAST, 16 * len(os.sched_getaffinity(0)) << 20))
    return max(1 << 20, min(wanted, free // 64) >> 20 << 20)


def least_size(default: int) -> int:
    """Bytes of an array from which rates are those of memory, not of caches; where memory is too small for that, the default."""
    return min(default, max(_LEAST, 2 * len(os.sched_getaffinity(0)) << 20))


def _lacks(kernels: list[str], sets: list[NodeSet], topology: Topology, size: int, least: int) -> str:
    """What these measurements lack of a profile, and how to get it; empty for nothing. A profile replaces the one before, so it
    takes Adam on every node."""
    if "adam" not in kernels:
        return "a profile takes the kernel adam"
    if missing := set(topology.memory_nodes) - {node_set.nodes[0] for node_set in sets if len(node_set.nodes) == 1}:
        return f"a profile takes every node by itself; leave out --nodes, or name {min(missing)} too"
    if size < least:
        return f"arrays of {size / 2**20:.2f} MiB may lie in caches; for a profile measure with --sizes {-(-least >> 20)}M or more"
    return ""


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: write bytes, or 64K, 256M, 2G")
    return max(4, int(found[1]) * _UNITS[found[2].upper()] // 4 * 4)


def _numbers(text: str, separator: str) -> tuple[int, ...]:
    parts = text.split(separator)
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: write numbers, as in {separator.join('03')}")
    return tuple(int(part) for part in parts)


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResultsError(f"cannot write {path}: {error.strerror}; name another file") from error


def _check_sets(sets: list[NodeSet], weights: list[tuple[int, ...]], topology: Topology) -> None:
    """Raise ConfigError for a node set that this machine does not have, and for a ratio that no node set takes."""
    for node_set in sets:
        try:
            node_set.placement.resolve(topology, "")
        except PlacementError as error:
            raise ConfigError(f"--{error.key.removeprefix('.')}", str(error).partition(": ")[2]) from None
    for ratio in weights:
        if not any(node_set.weights == ratio for node_set in sets):
            raise ConfigError(
                "--weights",
                f"{':'.join(map(str, ratio))}: no node set takes it; name one of as many nodes, two at least, with --nodes",
            )


def _check_room(size: int, count: int) -> None:
    """Raise ConfigError where all arrays together are more than the machine has."""
    free = free_memory()
    if _ARRAYS * size * count > free.bytes:
        raise ConfigError(
            "--sizes",
            f"{size / 2**30:.2f} GiB: {_ARRAYS} arrays of it in each of {_processes(count)} are more than the "
            f"{free.bytes / 2**30:.2f} GiB free by {free.limit}; use {free.bytes // (_ARRAYS * count) >> 20}M or less",
        )


def _check_writable(key: str, path: Path) -> None:
    """Raise ConfigError where a file cannot be written; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(
            key, f"cannot write {path} ({error.strerror}); name a file in a folder that you can write to"
        ) from None


def _parser() -> Parser:
    parser = Parser(prog="python -m ldft.bench", description="Measure what this machine can do.")
    nodes = parser.add_subparsers(dest="command", required=True).add_parser("nodes", help="bandwidth by NUMA node")
    nodes.add_argument(
        "--nodes", nargs="+", type=lambda t: _numbers(t, ","), help="node sets, e.g. 0 3 0,3; default: each node"
    )
    nodes.add_argument(
        "--weights",
        nargs="+",
        type=lambda t: _numbers(t, ":"),
        default=[],
        help="ratios for the sets of as many nodes, e.g. 1:1 4:1",
    )
    nodes.add_argument(
        "--sizes", nargs="+", type=_size, help="bytes of an array, e.g. 64M 1G; default: what suits the machine"
    )
    nodes.add_argument("--processes", nargs="+", type=int, default=None, help="default: 1, and as many as GPUs")
    nodes.add_argument("--kernels", nargs="+", choices=[*CPU_KERNELS, *COPIES], default=[*CPU_KERNELS, *COPIES])
    nodes.add_argument("--repeats", type=int, default=7, help="timed repetitions, after two to warm up; default: 7")
    nodes.add_argument("--rows", type=Path, metavar="OUT.parquet", help="also write every measurement as a row")
    nodes.add_argument("--profile", type=Path, help="where the profile goes; default: where numa=optimal looks for it")
    return parser


def main() -> int:
    """Returns the exit code: 0, 1 when nothing could be measured or written, 2 for wrong input."""
    from ldft import environment

    arguments = _parser().parse_args()
    topology = read_topology()
    whole = arguments.nodes or [(node,) for node in topology.memory_nodes]
    sets = [NodeSet(nodes) for nodes in whole]
    sets += [NodeSet(n, w) for n, w in itertools.product(whole, arguments.weights) if len(n) == len(w) > 1]
    default = default_size(topology)
    sizes, least = arguments.sizes or [default], least_size(default)
    path = arguments.profile or bandwidths.profile_path()
    counts = arguments.processes or sorted({1, max(1, len(environment.gpus()))})
    try:
        for key, least_given in (("--repeats", arguments.repeats), ("--processes", min(counts))):
            if least_given < 1:
                raise ConfigError(key, f"{least_given} is too small; use 1 or more")
        _check_sets(sets, arguments.weights, topology)
        _check_room(max(sizes), max(counts))
        lacks = _lacks(arguments.kernels, sets, topology, max(sizes), least)
        if arguments.rows:
            _check_writable("--rows", arguments.rows)
        if not lacks:
            _check_writable("--profile", path)
        rows = measure(sets, sizes, counts, arguments.kernels, arguments.repeats)
        if arguments.rows:
            _write_rows(rows, arguments.rows)
            print(f"ldft: rows: {arguments.rows}")
        found = profile(rows)
        if not lacks:
            left_out = [
                node for node in topology.memory_nodes if "cpu" not in found["bandwidth"].get(f"node{node}", {})
            ]
            lacks = f"node {left_out[0]} was left out" if left_out else ""
        if not rows:
            return 1
        if lacks:
            print(f"ldft: profile: {path} is left as it was: {lacks}")
        else:
            bandwidths.save(found, path)
            print(f"ldft: profile: {path}: {json.dumps(found['bandwidth'])}")
        return 0
    except KeyboardInterrupt:
        return 130
    except (ConfigError, PlacementError) as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 2
    except (LdftError, OSError) as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 1
