"""Plans against what happened: predicted and measured time of each plan, and its regret against neighbouring settings.

    python benchmarks/plans.py OUT.parquet                      # CELLS below, about a quarter of an hour
    python benchmarks/plans.py OUT.parquet "model=llama3_3b seq_len=32k" "model=llama3_8b seq_len=8k memory.vram_gib=48"
    python benchmarks/plans.py OUT.parquet "model=llama3_1b seq_len=8k" --neighbours 8 --with train.iterations=6

Each cell is a command line for plan=fastest. Its plan is made and run like any run; with --neighbours, so are the settings that
differ from it: the fastest plan of every other kind (offload, recomputation, where attention is kept), then the same kind with
more and fewer layers recomputed. The fastest of many noisy runs is faster than it would be again: so the two fastest neighbours run
twice more, in turns with the plan. Rows are ldft's own, with `cell`, `setting` (plan or neighbour), `changed` and `again`, the
number of the repetition.

Regret is how much faster the best setting of a cell was than its plan, each by the median iteration of all its runs; of the
neighbours, those that ran again count. This machine must have been measured (`python -m ldft.bench machine`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shlex
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ldft.cli.plan_command import resolved_config
from ldft.config import Config, Goal
from ldft.planning import settled
from ldft.planning.search import Plan, Search
from ldft.results import schema
from ldft.runner import checks, parent

# Iterations by length: the first ones are warm-up.
_FEW, _SOME, _MANY = (
    "train.iterations=2 train.warmup_iterations=1",
    "train.iterations=5",
    "train.iterations=21",
)
CELLS = (
    *(f"model=llama3_{size} seq_len=8k {_MANY}" for size in ("1b", "3b", "8b")),
    *(f"model=llama3_{size} seq_len=32k {_SOME}" for size in ("1b", "3b", "8b")),
    f"model=llama3_3b seq_len=8k memory.vram_gib=24 {_MANY}",
    f"model=llama3_8b seq_len=8k memory.vram_gib=24 {_MANY}",
    f"model=llama3_3b seq_len=32k memory.vram_gib=24 {_SOME}",
    f"model=llama3_8b seq_len=32k memory.vram_gib=48 {_SOME}",
    f"model=llama3_1b seq_len=128k memory.vram_gib=24 {_FEW}",
    *(f"model=llama3_{size} seq_len=128k {_FEW}" for size in ("1b", "3b", "8b")),
)
# How far from the plan's number of recomputed layers its neighbours of the same kind are.
_STEPS = (1, -1, 2, -2, 4, -4, 8, -8)
# How many neighbours run again, and how often.
_FASTEST, _AGAIN = 2, 2


def neighbours(searched: Search, plan: Plan, count: int) -> list[Plan]:
    """The fastest plan of every other kind, then those of the same kind with near numbers of layers; `count` in all."""
    plans = searched.within(1000.0)
    kinds = {plan.choice.kind: plan}
    for one in plans:
        kinds.setdefault(one.choice.kind, one)
    found = [one for one in kinds.values() if one is not plan]
    layers = plan.run.config.checkpointing.recomputed(plan.run.config.model.num_layers)
    by_layers = {
        one.run.config.checkpointing.recomputed(one.run.config.model.num_layers): one
        for one in plans
        if one.choice.kind == plan.choice.kind
    }
    found += [by_layers[layers + step] for step in _STEPS if layers + step in by_layers]
    return found[:count]


def measured(config: Config, folder: Path) -> dict[str, Any]:
    """The row of one run."""
    config = copy.deepcopy(config)
    config.results.dir = str(folder)
    checks.resolve(config)
    row = parent.run(config).row
    written = json.loads(row["config_json"])
    written["results"]["dir"] = "results"  # not this benchmark's scratch folder
    return row | {"config_json": json.dumps(written), "cfg.results.dir": "results", "log_path": None}


def run_cell(text: str, further: list[str], count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a cell, as they are measured."""
    config = resolved_config([*shlex.split(text), *further])
    config.plan.goal = Goal.fastest
    searched = settled.started(config)
    plan = searched.best()
    if plan is None:
        print(f"{text}: {settled.nothing_fits(searched)}", flush=True)
        return

    def row_of(setting: str, one: Plan, again: int) -> dict[str, Any]:
        changed = " ".join(settled.changes(config, one.run.config))
        run = dataclasses.replace(one.run.config, plan=dataclasses.replace(config.plan, goal=Goal.none))
        row = measured(run, folder) | {"cell": text, "setting": setting, "changed": changed, "again": again}
        took = f"{row['iteration_median_s']:.3f} s" if row.get("iteration_median_s") else str(row.get("error_message"))
        expected = row.get("predicted_iteration_s")
        print(f"{text}: {setting} {changed}: {row['status']}, {took}, expected {expected}", flush=True)
        return row

    yield row_of("plan", plan, 0)
    found = []
    for one in neighbours(searched, plan, count) if count else []:
        row = row_of("neighbour", one, 0)
        yield row
        if row["status"] == "ok":
            found.append((row["iteration_median_s"], one))
    found.sort(key=lambda pair: pair[0])
    for again in range(1, _AGAIN + 1) if found else ():
        yield row_of("plan", plan, again)
        for _, one in found[:_FASTEST]:
            yield row_of("neighbour", one, again)


def seconds(runs: pd.DataFrame) -> float:
    """The median iteration after warm-up, over all these runs."""
    counted = zip(runs["iteration_s"], runs["warmup_iterations"], strict=True)
    return float(statistics.median(sample for samples, warm in counted for sample in samples[warm:]))


def regret(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a cell: seconds predicted and measured for the plan, the error of the prediction; of the best neighbour, and the
    regret."""
    found = []
    for cell, part in rows[rows["status"] == "ok"].groupby("cell", sort=False):
        plans, others = part[part["setting"] == "plan"], part[part["setting"] == "neighbour"]
        if plans.empty:
            continue
        expected, took = plans["predicted_iteration_s"].iloc[0], seconds(plans)
        tokens = plans["tokens_per_iteration"].iloc[0]
        line = {"cell": cell, "tokens_per_s": tokens / took, "predicted_s": expected, "measured_s": took}
        line |= {"error": expected / took - 1, "neighbours": others["changed"].nunique()}
        repeated = others[others["changed"].isin(others[others["again"] > 0]["changed"])]
        if not repeated.empty:
            best = min(seconds(runs) for _, runs in repeated.groupby("changed"))
            line |= {"best_neighbour_s": best, "regret": max(0.0, took / best - 1)}
        found.append(line)
    return pd.DataFrame(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cells", nargs="*", default=CELLS)
    parser.add_argument("--neighbours", type=int, default=0)
    parser.add_argument("--with", dest="further", nargs="*", default=[], help="overrides for every cell")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    own = [pa.field(name, pa.string()) for name in ("cell", "setting", "changed")] + [pa.field("again", pa.int64())]
    whole = pa.schema([*own, *schema.schema()])
    with tempfile.TemporaryDirectory() as folder:
        for cell in arguments.cells:
            for row in run_cell(cell, arguments.further, arguments.neighbours, Path(folder)):
                rows.append(row)
                pq.write_table(pa.Table.from_pylist(rows, schema=whole), arguments.out)  # after each: time may run out
    if not rows:
        return 1
    print(regret(pd.read_parquet(arguments.out)).to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
