"""Host memory and initialisation: ldft's arenas and update against stock DeepSpeed's tensors and CPUAdam, in turns.

    python benchmarks/placement.py model=llama3_3b seq_len=32k checkpointing=cpu [--rounds 2] [-o ROWS.parquet]

All other arguments are overrides for `python -m ldft`, the same for both. For each it prints: peak and steady host memory, next to
the bytes that the roles and the layer inputs need (the limit); seconds from the start of the rank's interpreter to the end of the
first update, in which stock DeepSpeed allocates its moments; the median of later iterations. -o saves the raw rows, one per run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from composed import without_plan

from ldft import results

MODES = {"ldft": ("memory.pinning=exact",), "stock": ("memory.pinning=torch", "optimizer.fused_step=false")}
INIT = ("imports", "operators", "rendezvous", "model", "checkpoint_buffers", "engine", "placement", "first_touch")


def run(mode: str, overrides: list[str], folder: Path) -> pa.Table:
    """One run's row. Exits if the run fails."""
    command = [sys.executable, "-m", "ldft", *without_plan(overrides), *MODES[mode], f"results.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    table = results.read_table(folder)
    row = table.to_pylist()[0]
    if row["status"] != "ok":
        sys.exit(f"{mode}: {row['status']}: {row['error_message']}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return table


def needed_gib(row: dict[str, Any]) -> float:
    """GiB that roles and layer inputs need, over all ranks."""
    sizes: dict[tuple[str, int, str], int] = {
        (entry["host"], entry["rank"], entry["role"]): entry["bytes"] for entry in row["roles"]
    }
    return sum(sizes.values()) / 2**30


def figures(row: dict[str, Any]) -> dict[str, float]:
    needed = needed_gib(row)
    counted = slice(row["warmup_iterations"], None)
    return {
        "peak host, GiB": row["peak_host_gib"],
        "steady host, GiB": sum(node["total_gib"] for node in row["nodes"]),
        "roles and layer inputs, GiB": needed,
        "peak / needed": row["peak_host_gib"] / needed,
        "start to first update, s": row["init_s"] + row["iteration_s"][0],
        "init, s": row["init_s"],
        **{f"  {part}, s": row.get(f"init_{part}_s") or 0.0 for part in INIT},
        "first iteration, s": row["iteration_s"][0],
        "iteration, s": row["iteration_median_s"],
        "step, s": statistics.median(row["step_s"][counted]),
        "final loss": row["loss"][-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="for python -m ldft, e.g. model=llama3_3b seq_len=32k")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turns")
    parser.add_argument("-o", "--output", type=Path, help="parquet file for the raw rows")
    arguments = parser.parse_args()
    tables: list[pa.Table] = []
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for turn in range(arguments.rounds):
        # The second run may find files in the page cache, so the order alternates between rounds.
        for mode in MODES if turn % 2 == 0 else reversed(list(MODES)):
            with tempfile.TemporaryDirectory() as folder:
                table = run(mode, arguments.overrides, Path(folder))
            tables.append(table)
            row = table.to_pylist()[0]
            found[mode].append(figures(row))
            said = found[mode][-1]
            print(
                f"round {turn + 1}, {mode}: peak {said['peak host, GiB']:.2f} GiB, {said['peak / needed']:.3f} of what is needed; "
                f"first update after {said['start to first update, s']:.1f} s; iteration {said['iteration, s']:.3f} s",
                flush=True,
            )
    if arguments.output:
        pq.write_table(pa.concat_tables(tables, promote_options="permissive"), arguments.output)
    print(
        f"\n{row['gpus'] or row['cpu']}, DeepSpeed {dict(row['versions']).get('deepspeed')}, {' '.join(arguments.overrides)}"
    )
    print(f"{'medians':<30}{'ldft':>14}{'stock':>15}{'stock / ldft':>14}")
    for name in found["ldft"][0]:
        ours, stock = (statistics.median(one[name] for one in found[mode]) for mode in MODES)
        ratio = f"{stock / ours:>14.3f}" if ours else ""
        print(f"{name:<30}{ours:>14.3f}{stock:>15.3f}{ratio}")


if __name__ == "__main__":
    main()
