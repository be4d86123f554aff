"""What lay in GPU memory at the peak of a memory snapshot, by the code that allocated it, beside what the estimate expected.

    python -m ldft model=llama3_3b seq_len=128k snapshot=true
    python benchmarks/snapshot_peak.py results/RUN/attempt-1/snapshot-0.pickle [--lines 25]

The peak is that of allocated memory, as in peak_vram_allocated_gib: a block counts from its allocation until torch is told to free
it. A snapshot is of one iteration; what was allocated before it has no known origin and is one line. If the run's own peak, in the
row beside the snapshot, is higher, it was at another time, such as the start.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

MIB = 2**20
BEFORE = "allocated before the recording"
# Packages whose code says what a block is for; torch's own frames lie between.
_TELLING = ("/ldft/", "/deepspeed/", "/transformers/", "/liger_kernel/", "/peft/")

Block = tuple[int, str]


def origin(frames: list[dict[str, Any]], deep: int = 3) -> str:
    """The innermost `deep` functions of code that says what a block is for, innermost first."""
    telling = [frame for frame in frames if any(package in frame["filename"] for package in _TELLING)]
    named = [f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in telling[:deep]]
    return " < ".join(named) or "no Python function: torch's autograd"


def peak(history: dict[str, Any], device: int = 0) -> list[Block]:
    """The blocks at the peak, as bytes and origin, from torch's snapshot of a process that used one GPU."""
    events = [event for event in history["device_traces"][device] if event["action"] in ("alloc", "free_requested")]
    blocks = [block for segment in history["segments"] for block in segment["blocks"]]
    # From what was left at the end back to what was there at the beginning.
    live: dict[int, Block] = {
        block["address"]: (block["size"], BEFORE) for block in blocks if block["state"] == "active_allocated"
    }
    for event in reversed(events):
        if event["action"] == "free_requested":
            live[event["addr"]] = (event["size"], BEFORE)
        else:
            live.pop(event["addr"], None)
    total = most = sum(size for size, _ in live.values())
    highest = -1
    for number, event in enumerate(events):
        total += event["size"] if event["action"] == "alloc" else -event["size"]
        if total > most:
            most, highest = total, number
    for event in events[: highest + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = (event["size"], origin(event["frames"]))
        else:
            del live[event["addr"]]
    return list(live.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--lines", type=int, default=25, help="how many of the largest origins (default: 25)")
    arguments = parser.parse_args()
    blocks = peak(pickle.loads(arguments.snapshot.read_bytes()))
    sizes: Counter[str] = Counter()
    for size, where in blocks:
        sizes[where] += size
    counts = Counter(where for _, where in blocks)
    print(f"{sizes.total() / MIB:9.1f} MiB in {len(blocks)} blocks at the peak")
    for where, size in sizes.most_common(arguments.lines):
        print(f"{size / MIB:9.1f} MiB in {counts[where]} from {where}")
    rank = int(arguments.snapshot.stem.removeprefix("snapshot-"))
    row = arguments.snapshot.with_name("row.parquet")
    if row.exists():
        [line] = pq.read_table(row).to_pylist()
        print(f"{line['peak_vram_allocated_gib'][rank] * 1024:9.1f} MiB is the run's peak, {line['predicted_vram_gib'] * 1024:.1f} "
              "MiB were expected:")  # fmt: skip
        for purpose, size in json.loads(line["predicted_vram_json"]).items():
            print(f"{size * 1024:9.1f} MiB {purpose}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
