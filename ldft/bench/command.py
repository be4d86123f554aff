"""`python -m ldft.bench`: its arguments, the checks before any measurement, and the files that it writes.

python -m ldft.bench machine                                 measure this machine once, for plans
python -m ldft.bench nodes                                   measure this machine and save its profile for numa=optimal
python -m ldft.bench nodes --rows streams.parquet --nodes 0 3 0,3 --weights 1:1 4:1 --sizes 64M 1G --processes 1 2
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldft import closed_pipe, files
from ldft.bench import machine, profile
from ldft.bench.nodes import ARRAYS, COPIES, CPU_KERNELS, SCHEMA, NodeSet, measure, processes
from ldft.errors import ConfigError, LdftError, ResultsError
from ldft.memory import bandwidths
from ldft.memory.limits import free_memory
from ldft.memory.policy import PlacementError
from ldft.memory.topology import Topology, read_topology
from ldft.terminal import Parser

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            pq.write_table(table, file)
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror}; name another file") from error


def _check_sets(sets: list[NodeSet], weights: list[tuple[int, ...]], topology: Topology) -> None:
    """Raise ConfigError for a node set that this machine does not have, and for a ratio that fits no node set."""
    for node_set in sets:
        try:
            node_set.placement.resolve(topology, "")
        except PlacementError as error:
            raise ConfigError(f"--{error.key.removeprefix('.')}", str(error).partition(": ")[2]) from None
    for ratio in weights:
        if not any(node_set.weights == ratio for node_set in sets):
            raise ConfigError(
                "--weights",
                f"{':'.join(map(str, ratio))}: fits no node set; with --nodes, name a set of as many nodes, at least two",
            )


def _check_room(size: int, count: int) -> None:
    """Raise ConfigError if all arrays together exceed the machine's memory."""
    free = free_memory()
    if ARRAYS * size * count > free.bytes:
        raise ConfigError(
            "--sizes",
            f"{size / 2**30:.2f} GiB: {ARRAYS} arrays of this size in each of {processes(count)} exceed the "
            f"{free.bytes / 2**30:.2f} GiB free by {free.limit}; use {free.bytes // (ARRAYS * count) >> 20}M or less",
        )


def _check_writable(key: str, path: Path) -> None:
    """Raise ConfigError if a file cannot be written. Creates its folder."""
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
    parser = Parser(prog="python -m ldft.bench", description="Measure this machine's memory bandwidths.")
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("machine", help="all that python -m ldft.plan needs, in about two minutes")
    whole.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="default: that of train.precision=auto")
    whole.add_argument("--profile", type=Path, help="file for the profile; default: where plans look for it")
    nodes = commands.add_parser("nodes", help="bandwidth by NUMA node")
    nodes.add_argument(
        "--nodes", nargs="+", type=lambda t: _numbers(t, ","), help="node sets, e.g. 0 3 0,3; default: each node"
    )
    nodes.add_argument(
        "--weights",
        nargs="+",
        type=lambda t: _numbers(t, ":"),
        default=[],
        help="interleave ratios, used for sets of as many nodes, e.g. 1:1 4:1",
    )
    nodes.add_argument(
        "--sizes", nargs="+", type=_size, help="bytes per array, e.g. 64M 1G; default: chosen for this machine"
    )
    nodes.add_argument(
        "--processes", nargs="+", type=int, default=None, help="concurrent processes; default: 1, and one per GPU"
    )
    nodes.add_argument("--kernels", nargs="+", choices=[*CPU_KERNELS, *COPIES], default=[*CPU_KERNELS, *COPIES])
    nodes.add_argument("--repeats", type=int, default=7, help="timed repetitions, after two warm-up ones; default: 7")
    nodes.add_argument("--rows", type=Path, metavar="OUT.parquet", help="also write each measurement as a row")
    nodes.add_argument("--profile", type=Path, help="file for the profile; default: where numa=optimal looks for it")
    return parser


def _machine(arguments: argparse.Namespace) -> int:
    path = arguments.profile or bandwidths.profile_path()
    _check_writable("--profile", path)
    machine.run(path, arguments.precision)
    return 0


def _nodes(arguments: argparse.Namespace) -> int:
    from ldft import environment

    topology = read_topology()
    whole = arguments.nodes or [(node,) for node in topology.memory_nodes]
    sets = [NodeSet(nodes) for nodes in whole]
    sets += [NodeSet(n, w) for n, w in itertools.product(whole, arguments.weights) if len(n) == len(w) > 1]
    default = profile.default_size(topology)
    sizes, least = arguments.sizes or [default], profile.least_size(default)
    path = arguments.profile or bandwidths.profile_path()
    counts = arguments.processes or sorted({1, max(1, len(environment.gpus()))})
    for key, least_given in (("--repeats", arguments.repeats), ("--processes", min(counts))):
        if least_given < 1:
            raise ConfigError(key, f"{least_given} is too small; use 1 or more")
    _check_sets(sets, arguments.weights, topology)
    _check_room(max(sizes), max(counts))
    lacks = profile.lacks(arguments.kernels, sets, topology, max(sizes), least)
    if arguments.rows:
        _check_writable("--rows", arguments.rows)
    if not lacks:
        _check_writable("--profile", path)
    rows = measure(sets, sizes, counts, arguments.kernels, arguments.repeats)
    if arguments.rows:
        _write_rows(rows, arguments.rows)
        print(f"ldft: rows: {arguments.rows}")
    found = profile.make(rows)
    if not lacks:
        left_out = [node for node in topology.memory_nodes if "cpu" not in found["bandwidth"].get(f"node{node}", {})]
        lacks = f"node {left_out[0]} was left out" if left_out else ""
    if not rows:
        return 1
    if lacks:
        print(f"ldft: profile: {path} is unchanged: {lacks}")
    else:
        profile.save(found, path)
        print(f"ldft: profile: {path}: {json.dumps(found['bandwidth'])}")
    return 0


@closed_pipe.work_on
def main() -> int:
    """Returns the exit code: 0, or 1 if nothing could be measured or written, or 2 for invalid input."""
    arguments = _parser().parse_args()
    try:
        return _machine(arguments) if arguments.command == "machine" else _nodes(arguments)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, PlacementError) as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 2
    except (LdftError, OSError) as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 1
