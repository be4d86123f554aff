"""The cost of the trace: tokens/s with one sample per second and without samples, in turns, on the same machine.

    python benchmarks/monitor.py OUT.parquet [--rounds N] [--interval S] [--with-monitor] [override ...]

    # llama3_1b on a GPU, all offloaded; the limit is 0.5%. About 2 minutes per round
    python benchmarks/monitor.py out.parquet --rounds 5 model=llama3_1b seq_len=8k train.iterations=20

Each round runs both, in the reverse order of the previous round. A run's speed is from the median of its iterations after warm-up;
the table has the median and spread over runs, and the ratio of the two runs of each round. With --with-monitor, `python -m
ldft.monitor` also runs during the runs with samples. Each record has the number of samples and the trace's largest GPU figures.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from contenders import CONTENDERS, Setting, config_of, run, surroundings
from training import counted, outcome, save

from ldft import environment
from ldft.monitor.trace import TRACE_FILE

# Largest allowed cost of one sample per second, as a fraction of tokens/s.
LIMIT = 0.005


def seen(folder: Path) -> dict[str, Any]:
    """The number of samples in a run's trace, and the largest figures of its GPUs."""
    found = list(folder.rglob(TRACE_FILE))
    if not found:
        return {"samples": 0}
    samples = pq.read_table(found[0]).to_pylist()
    devices = [device for sample in samples for device in sample["devices"]]

    def largest(name: str) -> int | None:
        return max((device[name] for device in devices if device[name] is not None), default=None)

    names = ("vram_used_mib", "pcie_rx_mb_per_s", "pcie_tx_mb_per_s", "utilisation_percent")
    age_s = max((sample["memory_age_s"] for sample in samples if sample["memory_age_s"] is not None), default=None)
    return {"samples": len(samples), "memory_age_s": age_s} | {f"largest_{name}": largest(name) for name in names}


def table(records: list[dict[str, Any]], interval_s: float) -> str:
    """Medians and spread of both, and the ratio of each round."""
    lines = [f"{'interval':>9} {'runs':>4} {'tokens/s':>9} {'min':>9} {'max':>9}  samples"]
    for interval in (0.0, interval_s):
        mine = [record for record in records if record["interval_s"] == interval and counted([record])]
        if not mine:
            return "\n".join([*lines, f"{interval:9g}    0: no successful run"])
        rates = [record["tokens_per_iteration"] / statistics.median(counted([record])) for record in mine]
        samples = statistics.median(record["samples"] for record in mine)
        lines.append(
            f"{interval:9g} {len(rates):4} {statistics.median(rates):9.1f} {min(rates):9.1f} {max(rates):9.1f}  {samples:g}"
        )
    ratios = []
    for number in sorted({record["round"] for record in records}):
        times = {r["interval_s"]: counted([r]) for r in records if r["round"] == number}
        if all(times.get(interval) for interval in (0.0, interval_s)):
            ratios.append(statistics.median(times[0.0]) / statistics.median(times[interval_s]))
    if not ratios:
        return "\n".join(lines)
    cost = 1 - statistics.median(ratios)
    lines.append(
        f"tokens/s with samples over without, by round: {', '.join(f'{ratio:.4f}' for ratio in ratios)}; median "
        f"{statistics.median(ratios):.4f}: a cost of {cost:.2%}, {'within' if cost <= LIMIT else 'above'} the limit of {LIMIT:.1%}"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples; the other run has none")
    parser.add_argument("--with-monitor", action="store_true", help="ldft.monitor beside the runs with samples")
    parser.add_argument("--contender", choices=CONTENDERS, default="ours-offload")
    gpu = bool(environment.gpus())
    parser.add_argument("--attention", default="sdpa_cudnn" if gpu else "sdpa")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a run is ended")
    parser.add_argument("--note", default="", help="free text, kept with every record")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    settings = {
        interval: Setting(
            (*options.overrides, f"monitor.interval_s={interval}"), options.attention, options.liger, options.timeout
        )
        for interval in (0.0, options.interval)
    }
    for setting in settings.values():
        config_of(CONTENDERS[options.contender], setting)  # a mistake in the overrides shows here, before anything runs
    common = surroundings(options.note)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            for interval in list(settings) if number % 2 == 0 else list(settings)[::-1]:
                folder = Path(scratch) / f"{number}-{interval:g}"
                beside = None
                if options.with_monitor and interval:
                    command = [sys.executable, "-m", "ldft.monitor", "--json", "--interval", f"{interval:g}"]
                    beside = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                try:
                    record = run(options.contender, settings[interval], folder)
                finally:
                    if beside:
                        beside.kill()
                        beside.wait()
                own = {"round": number, "interval_s": interval, "with_monitor": beside is not None}
                records.append(own | seen(folder) | record | common)
                save(records, options.out)
                print(f"round {number} interval {interval:g}: {outcome(record)}", flush=True)
    print(table(records, options.interval))
    return 0 if all(record["status"] == "ok" for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
