"""The CPU update beside copies and kernels: what each loses to the others, by number of update threads.

    python benchmarks/contention.py OUT.parquet                    # 0.5e9 parameters, 12 GiB of pinned memory

AdamW over bf16 gradients with a bf16 copy of the weights, 28 bytes a parameter, as ldft runs it: its native threads at the nice
value of the overlapped update, over pinned arenas in huge pages. Beside it, each on a stream of its own and without pause: copies
from host to device, copies back, square bf16 matrix products; or calls of small modules, each some microseconds of
Python, which is what a model with short sequences waits for. One thread of this process keeps --ahead products, and as many
copies, in the queue, as the thread that launches a model's kernels does; where it cannot, since the update has all cores, the
device waits.

A sample is one update, or with 0 threads as much time without one. Copies and products are counted over exactly that time, from
CUDA events. All combinations take turns within a round, every other round backwards; round 0 is warm-up. Copies alone and products
alone are the limits. Without a GPU, only the update alone and beside Python is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contenders import surroundings

from ldft.memory.allocator import allocate
from ldft.memory.policy import Placement
from ldft.training.optimizers.host_optimizer import HostAdamW, prepared

MIB = 1 << 20
# What runs beside -> its unit.
UNITS = {"h2d": "gb", "d2h": "gb", "kernels": "tflop", "python": "calls"}
BESIDE = (
    *((), ("python",), ("h2d",), ("d2h",), ("h2d", "d2h"), ("kernels",), ("kernels", "h2d")),
    ("kernels", "h2d", "d2h"),
)


def thread_counts(cores: int) -> list[int]:
    """All cores, one and two fewer, three quarters, half."""
    return list(dict.fromkeys(max(1, count) for count in (cores, cores - 1, cores - 2, cores * 3 // 4, cores // 2)))


def done_by(ends_s: list[float], moment_s: float) -> float:
    """Pieces of work done at a moment, where one is in progress with the part of its time that has passed. ends_s: when the first
    began, and when each ended."""
    return float(np.interp(moment_s, ends_s, np.arange(len(ends_s))))


class Stream:
    """Equal pieces of work on a CUDA stream, a few of them queued ahead."""

    def __init__(self, launch: Callable[[int], Any], size: float, ahead: int) -> None:
        """launch: queue one piece, given its number, on the current stream. size: of a piece, in GB or TFLOP."""
        self._launch, self._size, self._ahead = launch, size, ahead
        self._stream = torch.cuda.Stream()
        self._events: list[Any] = []
        self._queued: deque[Any] = deque()

    def begin(self) -> None:
        self._queued.clear()
        self._events = [self._event()]

    def feed(self) -> None:
        """Fill the queue."""
        while self._queued and self._queued[0].query():
            self._queued.popleft()
        while len(self._queued) < self._ahead:
            with torch.cuda.stream(self._stream):
                self._launch(len(self._events))
            self._events.append(self._event())
            self._queued.append(self._events[-1])

    def rate(self, zero: Any, begin_s: float, end_s: float) -> float:
        """GB/s or TFLOP/s between two moments, seconds after the event `zero`. The stream must have ended its work."""
        ends = [zero.elapsed_time(event) / 1e3 for event in self._events]
        return self._size * (done_by(ends, end_s) - done_by(ends, begin_s)) / (end_s - begin_s)

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


def copies(way: str, gib: float, piece_mib: int, ahead: int) -> Stream:
    """Copies between pinned host memory, which they walk through, and one buffer on the device."""
    size = piece_mib * MIB
    pieces = max(2, int(gib * 1024) // piece_mib)
    host = allocate(pieces * size, torch.uint8, Placement(), pin=True)
    device = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def launch(number: int) -> None:
        part = host[number % pieces * size :][:size]
        to, source = (device, part) if way == "h2d" else (part, device)
        to.copy_(source, non_blocking=True)

    return Stream(launch, size / 1e9, ahead)


def products(size: int, ahead: int) -> Stream:
    """Products of random square bf16 matrices."""
    a, b, out = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return Stream(lambda number: torch.mm(a, b, out=out), 2e-12 * size**3, ahead)


class Calls:
    """Calls of a small module, one after the other, which the device ends sooner than Python starts them."""

    def __init__(self, device: str) -> None:
        self._module = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8))).to(device)
        self._inputs = torch.zeros(16, 16, device=device)
        self._ends_s: list[float] = []

    def begin(self) -> None:
        self._ends_s = [time.perf_counter()]

    def feed(self) -> None:
        self._module(self._inputs)
        self._ends_s.append(time.perf_counter())

    def rate(self, zero: Any, begin_s: float, end_s: float) -> float:
        """Calls a second between two moments, seconds after it began."""
        ends = [end - self._ends_s[0] for end in self._ends_s]
        return (done_by(ends, end_s) - done_by(ends, begin_s)) / (end_s - begin_s)


class State:
    """What the update reads and writes, of `parameters` parameters."""

    def __init__(self, parameters: int, pin: bool) -> None:
        kinds = [torch.float32] * 3 + [torch.bfloat16] * 2
        made = [allocate(parameters, kind, Placement(), pin=pin) for kind in kinds]
        self.weights, momentum, variance, gradients, self.copy = made
        noise = torch.randn(MIB)
        for tensor in (self.weights, gradients):  # neither zeros nor denormals, whose arithmetic takes other times
            for part in tensor.split(MIB):
                part.copy_(noise[: part.numel()])
        self._optimizer = HostAdamW([self.weights], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)
        self._optimizer.state[self.weights] = {"step": 0, "exp_avg": momentum, "exp_avg_sq": variance}
        self.weights.grad_dtype = gradients.dtype
        self.weights.grad = gradients

    def update(self, piece: int = 32 * MIB) -> tuple[Any, int]:
        """The _native.Update of one more step, not started, and the bytes that it will move. piece: elements of a parameter."""
        count = self.weights.numel()
        parts = [min(piece, count - begin) for begin in range(0, count, piece)]
        tasks = self._optimizer.tasks(self.weights, self._optimizer.param_groups[0], copy=self.copy, parts=parts)
        return prepared(tasks), 28 * count


def sample(
    streams: dict[str, Stream | Calls], beside: Iterable[str], state: State, threads: int, options: Any
) -> dict[str, Any]:
    """Rates of one update by `threads` threads beside those streams, or, with 0, of the streams alone. worst_gap_ms: longest time
    between two visits of the launching thread to its queues."""
    running = [streams[name] for name in beside]
    zero = _now() if running and torch.cuda.is_available() else None
    zero_s = time.perf_counter()
    job, size = state.update() if threads else (None, 0)
    for stream in running:
        stream.begin()
    last = gap = 0.0

    def feed() -> None:
        nonlocal last, gap
        for stream in running:
            stream.feed()
        if not {"kernels", "python"} & set(
            beside
        ):  # copies take long enough: the thread of a model that only waits sleeps, too
            time.sleep(2e-4)
        now = time.perf_counter()
        gap, last = max(gap, now - last), now

    while running and time.perf_counter() < zero_s + options.settle:
        feed()
    begin_s = last = time.perf_counter()
    gap = 0.0
    if job is None:
        while time.perf_counter() < begin_s + options.least:
            feed()
        end_s = time.perf_counter()
    else:
        job.start(threads, options.nice)
        looked = begin_s
        while True:
            feed()
            if time.perf_counter() - looked > 1e-3:  # seldom, as looking takes the lock that the threads need
                looked = time.perf_counter()
                if job.progress[2] == size:
                    break
        end_s = begin_s + job.progress[0]
        job.finish()
    found: dict[str, Any] = {"update_gb_per_s": size / 1e9 / (end_s - begin_s) if threads else None}
    if zero is not None:
        torch.cuda.synchronize()
    for name, unit in UNITS.items():
        rate = streams[name].rate(zero, begin_s - zero_s, end_s - zero_s) if name in beside else None
        found[f"{name}_{unit}_per_s"] = rate
    return found | {"seconds": end_s - begin_s, "worst_gap_ms": 1e3 * gap}


def _now() -> Any:
    """A CUDA event of now, on an idle device."""
    torch.cuda.synchronize()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    return event


def medians(rows: list[dict[str, Any]], column: str) -> dict[tuple[str, int], float]:
    """By what ran beside and threads, without the warm-up."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["round"] and row[column] is not None:
            found.setdefault((row["beside"], row["threads"]), []).append(row[column])
    return {key: statistics.median(values) for key, values in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """One block a quantity: lines are what ran beside, columns the number of update threads."""
    threads = sorted({row["threads"] for row in rows}, reverse=True)
    lines = []
    for column, title in {
        "update_gb_per_s": "update, GB/s",
        "h2d_gb_per_s": "copies to the device, GB/s",
        "d2h_gb_per_s": "copies to the host, GB/s",
        "kernels_tflop_per_s": "products, TFLOP/s",
        "python_calls_per_s": "calls of a small module, 1/s",
        "worst_gap_ms": "longest time between two visits of the launching thread, ms",
    }.items():
        values = medians(rows, column)
        if column == "worst_gap_ms":
            values = {key: value for key, value in values.items() if key[0] != "nothing"}
        if not values:
            continue
        lines += ["", f"{title:30}" + "".join(f"{count or 'none':>10}" for count in threads) + "  update threads"]
        for name in dict.fromkeys(beside for beside, _ in values):
            cells = [f"{values[name, count]:10.1f}" if (name, count) in values else f"{'-':>10}" for count in threads]
            lines.append(f"  beside {name:21}" + "".join(cells))
    return "\n".join(lines[1:])


def combinations(gpu: bool, threads: list[int]) -> list[tuple[tuple[str, ...], int]]:
    """(what runs beside, update threads); 0 threads: no update."""
    beside = BESIDE if gpu else BESIDE[:2]
    return [(streams, count) for streams in beside for count in (*threads, 0) if streams or count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("out", type=Path)
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=thread_counts(cores), help="of the update, default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=8, help="the first is warm-up (default 8)")
    parser.add_argument("--nice", type=int, default=10, help="nice value of the update's threads (default 10)")
    parser.add_argument("--copy-gib", type=float, default=2.0, help="host memory that copies walk through, each way")
    parser.add_argument("--piece-mib", type=int, default=48, help="size of a copy (default 48, a matrix of a 3B model)")
    parser.add_argument("--matrix", type=int, default=4096, help="rows of the products' matrices")
    parser.add_argument("--ahead", type=int, default=4, help="pieces of work in each queue")
    parser.add_argument("--settle", type=float, default=0.03, help="seconds that streams run before the update starts")
    parser.add_argument("--least", type=float, default=0.15, help="seconds of a sample without an update")
    parser.add_argument("--note", default="", help="free text, kept with every sample")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    state = State(int(options.parameters), gpu)
    streams: dict[str, Stream | Calls] = {"python": Calls("cuda" if gpu else "cpu")}
    if gpu:
        streams |= {way: copies(way, options.copy_gib, options.piece_mib, options.ahead) for way in ("h2d", "d2h")}
        streams["kernels"] = products(options.matrix, options.ahead)
    rows: list[dict[str, Any]] = []
    turns = combinations(gpu, options.threads)
    for number in range(options.rounds):
        for beside, threads in turns[:: -1 if number % 2 else 1]:
            about = {"round": number, "beside": "+".join(beside) or "nothing", "threads": threads}
            rows.append(about | sample(streams, beside, state, threads, options))
    where = torch.cuda.get_device_name() if gpu else "no GPU"
    print(f"{where}, {cores} cores, {options.parameters:g} parameters, 28 bytes each")
    print(table(rows))
    settings = {
        name: value for name, value in vars(options).items() if name not in ("out", "threads", "rounds", "note")
    }
    common = settings | surroundings(options.note)
    pq.write_table(pa.Table.from_pylist([row | common for row in rows]), options.out)
    print(f"{len(rows)} samples: {options.out}")


if __name__ == "__main__":
    main()
