"""Plans against what happened: predicted and measured time of each plan, and its regret against neighbouring settings.

    python benchmarks/plans.py OUT.parquet                      # CELLS below, about a quarter of an hour
    python benchmarks/plans.py OUT.parquet "model=llama3_3b seq_len=32k" "model=llama3_8b seq_len=8k memory.vram_gib=48"
    python benchmarks/plans.py OUT.parquet "model=llama3_1b seq_len=8k" --neighbours 8 --with train.iterations=6

Each cell is a command line for plan=fastest. Its plan is made and run like any run; with --neighbours, so are the settings that
differ from it: the fastest plan of every other kind (offload, recomputation, where attention is kept), then the same kind with
more and fewer layers recomputed. Rows are ldft's own, with `cell`, `setting` (plan or neighbour) and `changed`. The measurement of
a plan is repeated at the end of its neighbours, so that drift of the machine shows.

Regret is how much faster the best setting of a cell was than its plan. This machine must have been measured
(`python -m ldft.bench machine`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shlex
import tempfile
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
    "train.iterations=9",
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
    return parent.run(config).row


def run_cell(text: str, further: list[str], count: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of a cell."""
    config = resolved_config([*shlex.split(text), *further])
    config.plan.goal = Goal.fastest
    searched = settled.started(config)
    plan = searched.best()
    if plan is None:
        print(f"{text}: {settled.nothing_fits(searched)}", flush=True)
        return []
    around = neighbours(searched, plan, count) if count else []
    rows = []
    for setting, one in [
        ("plan", plan),
        *(("neighbour", one) for one in around),
        *([("plan", plan)] if around else []),
    ]:
        changed = " ".join(settled.changes(config, one.run.config))
        row = measured(
            dataclasses.replace(one.run.config, plan=dataclasses.replace(config.plan, goal=Goal.none)), folder
        )
        rows.append(row | {"cell": text, "setting": setting, "changed": changed})
        took = f"{row['iteration_median_s']:.3f} s" if row.get("iteration_median_s") else str(row.get("error_message"))
        print(
            f"{text}: {setting} {changed}: {row['status']}, {took}, expected {row.get('predicted_iteration_s')}",
            flush=True,
        )
    return rows


def regret(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a cell: the plan's tokens/s (median of its runs), the best neighbour's, the regret, the error of the prediction."""
    found = []
    for cell, part in rows[rows["status"] == "ok"].groupby("cell", sort=False):
        plans, others = part[part["setting"] == "plan"], part[part["setting"] == "neighbour"]
        if plans.empty:
            continue
        speed, best = plans["tokens_per_s"].median(), others["tokens_per_s"].max()
        line = {"cell": cell, "tokens_per_s": speed, "neighbours": len(others), "best_neighbour": best}
        line["regret"] = max(0.0, best / speed - 1) if len(others) else float("nan")
        expected, took = plans["predicted_iteration_s"].iloc[0], plans["iteration_median_s"].median()
        found.append(line | {"predicted_s": expected, "measured_s": took, "error": expected / took - 1})
    return pd.DataFrame(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cells", nargs="*", default=CELLS)
    parser.add_argument("--neighbours", type=int, default=0)
    parser.add_argument("--with", dest="further", nargs="*", default=[], help="overrides for every cell")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    own = [pa.field(name, pa.string()) for name in ("cell", "setting", "changed")]
    whole = pa.schema([*own, *schema.schema()])
    with tempfile.TemporaryDirectory() as folder:
        for cell in arguments.cells:
            rows += run_cell(cell, arguments.further, arguments.neighbours, Path(folder))
            pq.write_table(pa.Table.from_pylist(rows, schema=whole), arguments.out)  # after each: time may run out
    if not rows:
        return 1
    print(regret(pd.read_parquet(arguments.out)).to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
