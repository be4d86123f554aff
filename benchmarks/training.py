"""Training: ldft, plain scripts around stock DeepSpeed, and the seed's settings, in turns on the same machine.

    python benchmarks/training.py OUT.parquet [override ...] [--rounds N] [--ranks N] [--contenders NAME ...]

    # 3B, 1 x 32768 tokens, one H200, about 5 minutes per round
    python benchmarks/training.py out.parquet model=llama3_3b seq_len=32k train.iterations=7

    # the cost of ldft itself: ldft against a plain script with the same DeepSpeed settings
    python benchmarks/training.py out.parquet model=llama3_1b seq_len=8k train.micro_batch_size=4 train.iterations=9 \\
        --attention sdpa --no-liger --rounds 3 --contenders ours-as-plain plain-same

Contenders take turns, each round starting with another one. Every run has its own processes; after each, the raw samples so far are
written to OUT.parquet, so that an interrupted benchmark keeps them. The table has medians of the samples after warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from contenders import CONTENDERS, Setting, config_of, run, surroundings

from ldft import environment
from ldft.config import Config

DEFAULT = ("ours-in-gpu", "plain-in-gpu-sdpa", "ours-offload", "plain-offload", "seed")


def save(records: list[dict[str, Any]], path: Path) -> None:
    """Write all records so far, with the environment, atomically."""
    names = list(dict.fromkeys(name for record in records for name in record))
    table = pa.Table.from_pylist([{name: record.get(name) for name in names} for record in records])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)


def counted(records: list[dict[str, Any]], column: str = "iteration_s") -> list[float]:
    """A column's samples after warm-up, over all runs."""
    return [sample for record in records for sample in (record[column] or [])[record["warmup_iterations"] :]]


def outcome(record: dict[str, Any]) -> str:
    """The progress text for one run."""
    times = counted([record])
    what = f"{statistics.median(times):.3f} s per iteration" if times else record.get("error_message")
    return f"{record['status']} in {record['duration_s']:.0f} s, {what}"


def line(records: list[dict[str, Any]], reference: list[dict[str, Any]], peak: float | None) -> str:
    """One contender in the table."""
    name, times = records[0]["contender"], counted(records)
    if not times:
        return f"{name:31} {records[-1]['status']}: {records[-1].get('error_message')}"
    median = statistics.median(times)
    first = records[0]
    rate = first["tokens_per_iteration"] / median
    tflops = (first["model_tflop_dense"] + first["model_tflop_attention"]) / median / first["ranks"]
    parts = [statistics.median(counted(records, part)) for part in ("forward_s", "backward_s", "step_s")]
    vram = max((max(record["peak_vram_allocated_gib"] or [0.0]) for record in records), default=0.0)
    host, init = (
        statistics.median(record[key] for record in records if record[key]) for key in ("peak_host_gib", "init_s")
    )
    ours = counted(reference)
    ratio = f"{median / statistics.median(ours):6.3f}" if ours else "     -"
    mfu = f"{tflops / peak:6.1%}" if peak else "     -"
    return (
        f"{name:31} {len(times):3} {rate:8.0f} {min(times):7.3f} {median:7.3f} {max(times):7.3f}  {ratio} "
        f"{vram:7.2f} {host:7.2f} {tflops:7.1f} {mfu}  {' / '.join(f'{part:.3f}' for part in parts)}  {init:.1f}"
    )


def table(records: list[dict[str, Any]], peak: float | None) -> str:
    """Medians of every contender, and ldft's speed-up over it."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record["contender"], []).append(record)
    head = (
        f"{'contender':31} {'n':>3} {'tokens/s':>8} {'min s':>7} {'median':>7} {'max s':>7}  {'ours x':>6} {'VRAM':>7} "
    )
    lines = [head + f"{'host':>7} {'TFLOP/s':>7} {'MFU':>6}  forward / backward / step s  init s"]
    lines += [line(mine, by_name.get(CONTENDERS[name].against or name, []), peak) for name, mine in by_name.items()]
    lines.append(
        "ours x: tokens/s of ldft / tokens/s of the contender. VRAM, host: GiB, VRAM per rank, host of all ranks."
    )
    return "\n".join(lines)


def limits(record: dict[str, Any], peak: float | None, matmul: float | None) -> list[str]:
    """Limits from the device's arithmetic alone: tokens/s without and with the forward pass that checkpointing repeats."""
    lines = []
    for what, rate in (("the device's dense peak", peak), ("the rate of one large matrix product", matmul)):
        if rate and record.get("model_tflop_dense"):
            seconds = (record["model_tflop_dense"] + record["model_tflop_attention"]) / record["ranks"] / rate
            tokens = record["tokens_per_iteration"]
            lines.append(
                f"limit at {what} ({rate:.0f} TFLOP/s): {tokens / seconds:.0f} tokens/s; "
                f"{tokens / seconds * 3 / 4:.0f} with the forward pass computed twice"
            )
    return lines


def matmul_tflops_per_s(size: int = 8192, seconds: float = 3.0) -> float:
    """Rate of square bf16 matrix products of random numbers on the first GPU, as torch runs them, warm."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    done, start = 0, 0.0
    for phase_s in (1.0, seconds):
        torch.cuda.synchronize()
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < phase_s:
            for _ in range(20):
                a @ b
            torch.cuda.synchronize()
            done += 20
    return done * 2 * size**3 / (time.perf_counter() - start) / 1e12


def peak_of(config: Config) -> float | None:
    """Dense peak of the machine's first GPU; None if it is unknown or there is no GPU."""
    from ldft.preflight.device_rates import peak_tflops_per_s

    gpus = environment.gpus()
    return peak_tflops_per_s(gpus[0], config.train.precision) if gpus else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1, help="processes, one per GPU")
    gpu = bool(environment.gpus())
    parser.add_argument(
        "--attention",
        default="sdpa_cudnn" if gpu else "sdpa",
        help="attention of ldft and of peers that do not set their own",
    )
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--matmul", action="store_true", help="measure the rate of one large matrix product too")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds after which a run is ended")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which no further run is started")
    parser.add_argument("--note", default="", help="free text, kept with every record")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    overrides = (*options.overrides, f"launch.num_ranks={options.ranks}")
    setting = Setting(overrides, options.attention, options.liger, options.timeout)
    names = list(options.contenders)
    config = config_of(CONTENDERS[names[0]], setting)  # a mistake in the overrides shows here, before anything runs
    common = surroundings(options.note)
    records: list[dict[str, Any]] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if time.monotonic() - begin > options.stop_after:
                    print(f"{name}: not started, {options.stop_after:g} s have passed", flush=True)
                    continue
                record = run(name, setting, Path(scratch) / f"{number}-{name}")
                records.append({"round": number} | record | common)
                save(records, options.out)
                print(f"round {number} {name}: {outcome(record)}", flush=True)
    peak = peak_of(config)
    print(table(records, peak))
    matmul = matmul_tflops_per_s() if options.matmul and gpu else None
    known = next((record for record in records if record.get("model_tflop_dense")), None)
    print("\n".join(limits(known, peak, matmul) if known else []))
    return 0 if all(record["status"] == "ok" for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
