"""Several GPUs of one host: tokens/s per GPU with 1, 2, 4 ... ranks, each with the same number of cores, in turns.

    python benchmarks/scaling.py OUT.parquet [override ...] [--cores 16] [--rounds N] --ranks 1 2

    # 3B, 32768 tokens per GPU, full offload; with two GPUs about 2 minutes per round
    python benchmarks/scaling.py out.parquet model=llama3_3b seq_len=32k train.iterations=7 --ranks 1 2

    # one sequence on one GPU, and shared by two
    python benchmarks/scaling.py out.parquet model=llama3_3b seq_len=128k train.iterations=3 train.warmup_iterations=1 \\
        'launch.sequence_parallel=${launch.num_ranks}' --ranks 1 2

The batch grows with the ranks, unless they share sequences: every GPU computes as many tokens as a single one would. The limit is
the tokens/s per GPU with the fewest ranks. Other cores stay idle, so that a single rank has no more cores than each of several.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Setting, config_of, run, surroundings
from training import counted, outcome, save

from ldft import environment
from ldft.memory.topology import SYSFS
from ldft.runner.core_binding import physical_cores


def table(records: list[dict[str, Any]]) -> str:
    """Medians by contender and number of ranks, each compared with the contender's smallest number of ranks."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["contender"], record["ranks"]), []).append(record)
    lines = [
        f"{'contender':28} {'ranks':>5} {'cores':>5} {'n':>3} {'tokens/s':>8} {'per GPU':>8} {'of fewest':>9} {'median s':>8}  "
        "forward / backward / step s  VRAM  host, GiB"
    ]
    fewest: dict[str, float] = {}
    for (name, ranks), mine in sorted(groups.items()):
        if not (times := counted(mine)):
            lines.append(f"{name:28} {ranks:5} {mine[-1]['status']}: {mine[-1].get('error_message')}")
            continue
        rate = mine[0]["tokens_per_iteration"] / statistics.median(times)
        parts = " / ".join(f"{statistics.median(counted(mine, p)):.3f}" for p in ("forward_s", "backward_s", "step_s"))
        vram = max(max(record["peak_vram_allocated_gib"] or [0.0]) for record in mine)
        host = statistics.median(record["peak_host_gib"] for record in mine if record["peak_host_gib"])
        share = rate / ranks / fewest.setdefault(name, rate / ranks)
        lines.append(
            f"{name:28} {ranks:5} {mine[0]['cores']:5} {len(times):3} {rate:8.0f} {rate / ranks:8.0f} {share:9.3f} "
            f"{statistics.median(times):8.3f}  {parts}  {vram:.1f}  {host:.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=("ours-offload",))
    parser.add_argument("--cores", type=int, help="cores per rank; default: all cores / the largest number of ranks")
    parser.add_argument("--rounds", type=int, default=1)
    gpu = bool(environment.gpus())
    parser.add_argument("--attention", default="sdpa_cudnn" if gpu else "sdpa")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds after which a run is ended")
    parser.add_argument("--note", default="", help="free text, kept with every record")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    everything = os.sched_getaffinity(0)
    physical = physical_cores(frozenset(everything), SYSFS)
    cores = options.cores or len(physical) // max(options.ranks)
    if cores * max(options.ranks) > len(physical) or cores < 1:
        parser.error(f"{max(options.ranks)} ranks with {cores} cores each, of {len(physical)} cores")
    pairs = [(name, ranks) for name in options.contenders for ranks in options.ranks]
    settings = {
        ranks: Setting(
            (*options.overrides, f"launch.num_ranks={ranks}"), options.attention, options.liger, options.timeout
        )
        for ranks in options.ranks
    }
    for name, ranks in pairs:
        config_of(CONTENDERS[name], settings[ranks])  # a mistake in the overrides shows here, before anything runs
    common = surroundings(options.note)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            for name, ranks in pairs if number % 2 == 0 else pairs[::-1]:
                os.sched_setaffinity(0, {cpu for core in physical[: cores * ranks] for cpu in core})
                record = run(name, settings[ranks], Path(scratch) / f"{number}-{name}-{ranks}")
                os.sched_setaffinity(0, everything)
                records.append({"round": number, "cores": cores} | record | common)
                save(records, options.out)
                print(f"round {number} {name} x{ranks}: {outcome(record)}", flush=True)
    print(table(records))
    return 0 if all(record["status"] == "ok" for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
