"""How often `python -m multirun_analysis diff --fail-below` refuses where nothing changed: from real rows, run again and again.

    python -m ldft -m model=llama3_1b seq_len=8k offload=none,full sweep.repeats=8 results.dir=ROWS
    python benchmarks/gate_alarms.py ROWS [--draws 2000]

Of each cell's runs, some are drawn as before and others as after a change, and the gate judges all cells at once. A false alarm is
a diff with a refused cell. Then the same with one cell whose runs after the change are a tenth slower, which it should refuse.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from multirun_analysis import load
from multirun_analysis.comparison import simultaneous, speed_ratio
from multirun_analysis.rows import cell_keys

Runs = list[np.ndarray]
BELOW = (0.97, 1.0)
_SLOWER = 0.9


def cells(folder: Path) -> list[Runs]:
    """Samples of tokens/s after warm-up of each run, by cell; cells that ran once are left out."""
    df = load(folder)
    df = df[df["ok"]]
    keys = [f"cfg.{key}" for key in cell_keys(df)]
    grouped = df.groupby([df[key].map(str) for key in keys], sort=False)
    return [list(part["sample_tokens_per_s"]) for _, part in grouped if len(part) > 1]


def refused(sides: Sequence[tuple[Runs, Runs]], below: float) -> list[bool]:
    """Of each cell, whether the gate over all of them refuses what came after."""
    confidence = simultaneous(len(sides))
    return [speed_ratio(after, before, confidence)["high"] < below for before, after in sides]


def rates(found: list[Runs], runs: int, below: float, draws: int, seed: int = 1) -> tuple[float, float]:
    """Shares of diffs with a false alarm, and of those in which the slower cell is refused. runs: of each cell and side."""
    random = np.random.default_rng(seed)
    alarms = seen = 0
    for draw in range(draws):
        sides = []
        for cell in found:
            drawn = random.permutation(len(cell))[: 2 * runs]
            sides.append(([cell[one] for one in drawn[:runs]], [cell[one] for one in drawn[runs:]]))
        alarms += any(refused(sides, below))
        one = draw % len(found)
        sides[one] = sides[one][0], [_SLOWER * samples for samples in sides[one][1]]
        seen += refused(sides, below)[one]
    return alarms / draws, seen / draws


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--draws", type=int, default=2000)
    arguments = parser.parse_args()
    found = cells(arguments.rows)
    if not found:
        parser.error(f"{arguments.rows}: no cell ran twice; use sweep.repeats=8")
    fewest = min(len(cell) for cell in found)
    print(f"{len(found)} cells, at least {fewest} runs each; {arguments.draws} diffs drawn of them")
    print(f"{'runs a side':>11} {'fail-below':>10} {'false alarms':>12} {'a tenth slower: refused':>23}")
    for runs in range(1, fewest // 2 + 1):
        for below in BELOW:
            alarms, seen = rates(found, runs, below, arguments.draws)
            print(f"{runs:11} {below:10.2f} {alarms:12.1%} {seen:23.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
