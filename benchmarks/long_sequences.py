"""Longest sequences that one GPU, or several that share them, can train on: one iteration of each, everything offloaded.

    python benchmarks/long_sequences.py OUT.parquet [override ...] [--timeout SECONDS] [--runs NAME:TOKENS ...]

There is no warm-up. The default is a 3B model. NAME is one of contenders.py; TOKENS a number, or of ldft `longest`: 95% of the
longest length that its estimate says to fit here, found by bisection. A run that does not fit is recorded too, with its status.

Expected time on an H200: with the forward pass computed twice, there are 8 FLOPs per token and weight, and 8 x layers x heads x
head_dim x tokens per token for causal attention: 5.4e16 for 3B at 256k, 8.2e16 at 320k, 4.5e17 at 768k. At 450 to 500 TFLOP/s this
takes 110 to 130 s, 170 to 200 s, 900 to 1000 s, plus half a minute to start. On a virtual machine that reports less memory than it
can grow to, add memory.capacity_gib=125.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Setting, config_of, run, surroundings
from training import save

from ldft import environment
from ldft.preflight import fit
from ldft.preflight.resolved import resolve

DEFAULT = ("ours-offload:262144", "ours-offload:longest", "plain-offload-alst:262144", "seed:196608")
# Lengths are multiples of this, at most as long as this.
STEP, MOST = 4096, 1 << 23


def longest(setting: Setting, name: str) -> int:
    """Tokens: 95% of the longest sequence that the estimate says to fit, a multiple of STEP. Raises SystemExit if none does."""

    def fits(steps: int) -> bool:
        more = dataclasses.replace(setting, overrides=(*setting.overrides, f"seq_len.tokens={steps * STEP}"))
        try:
            fit.examine(resolve(config_of(CONTENDERS[name], more)))
        except fit.DoesNotFitError:
            return False
        return True

    low, high = 0, MOST // STEP  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise SystemExit(f"{name}: not even {STEP} tokens fit here")
    return int(0.95 * low) * STEP


def line(record: dict[str, Any]) -> str:
    """One run in the table."""
    tokens = json.loads(record["config_json"])["seq_len"]["tokens"]
    what = f"{record['contender']:14} {tokens:7} {record['status']:10}"
    times = record["iteration_s"] or []
    if not times:
        return f"{what} {record['duration_s']:6.0f} {record.get('error_message')}"
    tflops = (record["model_tflop_dense"] + record["model_tflop_attention"]) / times[0] / record["ranks"]
    rate = record["tokens_per_iteration"] / times[0]
    parts = " / ".join(f"{record[part][0]:.1f}" for part in ("forward_s", "backward_s", "step_s"))
    vram = max(record["peak_vram_allocated_gib"] or [0.0])
    return (
        f"{what} {record['duration_s']:6.0f} {times[0]:9.1f} {rate:8.0f} {tflops:7.1f} {vram:6.1f} "
        f"{record['peak_host_gib']:6.1f}  {parts}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--runs", nargs="+", default=DEFAULT, metavar="NAME:TOKENS", help=f"names: {', '.join(CONTENDERS)}"
    )
    gpu = bool(environment.gpus())
    parser.add_argument("--attention", default="sdpa_cudnn" if gpu else "sdpa")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds after which a run is ended")
    parser.add_argument("--note", default="", help="free text, kept with every record")
    parser.add_argument("overrides", nargs="*", help="default: model=llama3_3b")
    options = parser.parse_intermixed_args()
    if wrong := [entry for entry in options.runs if entry.partition(":")[0] not in CONTENDERS]:
        parser.error(f"--runs: {wrong[0]}: no contender of contenders.py; overrides come before --runs")
    common = surroundings(options.note)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for entry in options.runs:
            name, _, tokens = entry.partition(":")
            model = () if any(item.startswith("model=") for item in options.overrides) else ("model=llama3_3b",)
            overrides = (*model, *options.overrides, "train.iterations=1", "train.warmup_iterations=0")
            setting = Setting(overrides, options.attention, options.liger, options.timeout)
            if tokens == "longest":
                tokens = str(longest(setting, name))
            setting = dataclasses.replace(setting, overrides=(*overrides, f"seq_len.tokens={tokens}"))
            record = run(name, setting, Path(scratch) / entry.replace(":", "-"))
            records.append(record | common)
            save(records, options.out)
            print(f"{name} {tokens} tokens: {record['status']} in {record['duration_s']:.0f} s", flush=True)
    head = (
        f"{'contender':14} {'tokens':>7} {'status':10} {'run s':>6} {'iteration':>9} tokens/s TFLOP/s   VRAM   host  "
    )
    print(head + "forward / backward / step s")
    print("\n".join(line(record) for record in records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
