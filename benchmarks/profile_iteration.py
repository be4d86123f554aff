"""Where one iteration's time goes on a GPU: kernels, copies and the host, from torch's profiler.

    python benchmarks/profile_iteration.py [--trace FILE.json.gz] [--windows N] override ...

Trains as `python -m ldft` would with these overrides, rank 0 in this process, and records its first iteration after warm-up. Prints
how long kernels, exchanges between ranks (NCCL's kernels) and copies in each direction were busy, what share of each window of the
iteration they were, bytes and rates of the copies, and the functions in which the host spent most time. --trace: also write the
trace, for ui.perfetto.dev. The profiler slows the host down: its iteration is printed beside the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composed import resolved_config

from ldft.config import Config
from ldft.preflight.resolved import complete
from ldft.preflight.selection import select
from ldft.runner import node_memory, worker
from ldft.runner.core_binding import cores_of_ranks

Interval = tuple[float, float]


def busy_us(intervals: list[Interval], begin: float = 0.0, end: float = float("inf")) -> float:
    """Microseconds between begin and end in which at least one interval was active."""
    total, last = 0.0, begin
    for a, b in sorted(intervals):
        a, b = max(a, last), min(b, end)
        if b > a:
            total += b - a
            last = b
    return total


def groups_of(events: list[dict[str, Any]]) -> dict[str, list[Interval]]:
    """Intervals of the device's work by kind."""
    groups: dict[str, list[Interval]] = {"kernels": [], "exchanges": [], "to device": [], "to host": []}
    for event in events:
        kind = "exchanges" if event["name"].startswith("nccl") else "kernels"
        if event["cat"] == "gpu_memcpy":
            kind = "to device" if "HtoD" in event["name"] else "to host" if "DtoH" in event["name"] else "on device"
        groups.setdefault(kind, []).append((event["ts"], event["ts"] + event["dur"]))
    return groups


def summary(trace: dict[str, Any], windows: int) -> str:
    events = [
        event
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    begin, end = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
    groups = groups_of(events)
    lines = [f"the device's work spans {(end - begin) / 1e6:.3f} s"]
    lines += [f"{name:10} busy {busy_us(found) / 1e6:7.3f} s in {len(found)}" for name, found in groups.items()]
    alone = busy_us(groups["kernels"] + groups["exchanges"]) - busy_us(groups["kernels"])
    lines.append(f"exchanges without a kernel beside them: {alone / 1e6:.3f} s")
    copies: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in events:
        if event["cat"] == "gpu_memcpy":
            entry = copies[event["name"]]
            entry[0] += 1
            entry[1] += event["args"].get("bytes", 0)
            entry[2] += event["dur"]
    for name, (count, size, took) in copies.items():
        lines.append(f"{name:34} {count:6} copies {size / 2**30:8.2f} GiB {size / max(took, 1e-9) / 1e3:6.1f} GB/s")
    lines.append("from s    kernels  exchanges  to device  to host (busy shares)")
    step = (end - begin) / windows
    for number in range(windows):
        a = begin + number * step
        shares = [
            busy_us(groups[name], a, a + step) / step for name in ("kernels", "exchanges", "to device", "to host")
        ]
        lines.append(f"{(a - begin) / 1e6:7.3f}   " + "  ".join(f"{share:8.2f}" for share in shares))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    config = resolved_config(options.overrides)
    rank = int(os.environ.get("RANK", "0"))
    others, cores = [], cores_of_ranks(config.launch.num_ranks, config.launch.device.name)
    if rank == 0:
        folder = Path(tempfile.mkdtemp())
        ranks = str(config.launch.num_ranks)
        os.environ |= {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "LOCAL_SIZE": ranks,
            "RANK": "0",
            "LOCAL_RANK": "0",
        }
        os.environ |= {"LDFT_RENDEZVOUS_DIR": str(folder), "DS_ACCELERATOR": config.launch.device.name}
        for number in range(1, config.launch.num_ranks):
            theirs = os.environ | {"RANK": str(number), "LOCAL_RANK": str(number)}
            others.append(subprocess.Popen([sys.executable, __file__, *options.overrides], env=theirs))
    folder = Path(os.environ["LDFT_RENDEZVOUS_DIR"])
    os.sched_setaffinity(0, cores[rank])
    os.environ.setdefault("OMP_NUM_THREADS", str(len(cores[rank])))
    selection = select(config)
    run = complete(selection)
    selection = dataclasses.replace(selection, deepspeed=run.deepspeed, **run.choices)
    first, _ = node_memory.begin(selection)

    from torch.profiler import ProfilerActivity, profile

    from ldft.training import snapshot

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    @contextmanager
    def recording(config: Config, folder: Path, iteration: int, rank: int) -> Iterator[None]:
        if iteration != config.train.warmup_iterations:
            yield
            return
        with profiler:
            yield

    snapshot.recording = recording
    report = worker._Report(folder, rank)
    worker._train(selection, report, rank, time.time(), first)
    if rank:
        return
    for name in ("iteration_s", "forward_s", "backward_s", "step_s", "update_s", "update_wait_s"):
        print(f"{name:14} {[round(value, 3) for value in report._values.get(name, [])]}")
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    text = path.read_text()
    print(summary(json.loads(text), options.windows))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    for other in others:
        other.wait()
    if options.trace:
        options.trace.write_bytes(gzip.compress(text.encode(), 5))


if __name__ == "__main__":
    main()
