"""Ratios with confidence: options of one config group against a baseline, and one results folder against another.

The statistic. The speed of a run is tokens_per_iteration over the median of its iteration times after warm-up; a speed-up
is the ratio of two such speeds (of their geometric means if a cell has several runs). Its confidence interval is
computed on logarithms from two sources of noise; the wider interval is used:

- iterations: the standard error of a run's median is taken as sqrt(pi/2) * s / sqrt(n), with s the standard deviation of
  the run's n log samples (sqrt(pi/2) is the efficiency loss of a median against a mean under normal noise; an outlier widens
  s and so the interval). Degrees of freedom by Welch and Satterthwaite.
- runs, if both sides have two or more: the pooled standard deviation of the runs' log medians, Student's t. Two runs per
  side give wide intervals (t = 4.3 at 95%), three much narrower ones (2.8).

One run per side says nothing about differences between runs (placement, clocks, neighbours): the column `basis` then
reads `iterations`. There is no correction for multiple comparisons: of 20 comparisons without a real difference, about
one "differs" at 95%.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ldft.errors import ResultsError
from multirun_analysis.labels import text
from multirun_analysis.rows import cell_keys, live, option_label, relabel

CONFIDENCE = 0.95
# The baseline policy, if the rows have it.
_BASELINES = ("local_only", "bind_0", "default")
_MEDIAN_LOSS = math.sqrt(math.pi / 2)


def speed_ratio(runs: list[np.ndarray], baseline: list[np.ndarray], confidence: float = CONFIDENCE) -> dict[str, Any]:
    """Ratio of the speeds of two cells, each given as one array of samples (tokens/s) per run.

    Returns speedup, low, high, basis (`iterations`, `runs`, or `none` if there is one sample only, hence no interval).
    """
    given = [[samples for samples in side if len(samples)] for side in (runs, baseline)]
    if not all(given):
        return {"speedup": math.nan, "low": math.nan, "high": math.nan, "basis": "none"}
    # Take the median of times, not of speeds: with an even number of samples they differ.
    medians = [np.array([-np.log(np.median(1 / run)) for run in side]) for side in given]
    sides = [[np.log(run) for run in side] for side in given]
    centre = float(medians[0].mean() - medians[1].mean())
    widths = {"iterations": _iterations_width(sides, confidence), "runs": _runs_width(medians, confidence)}
    known = {name: width for name, width in widths.items() if width is not None}
    if not known:
        return {"speedup": math.exp(centre), "low": math.nan, "high": math.nan, "basis": "none"}
    basis = max(known, key=lambda name: known[name])
    width = known[basis]
    return {
        "speedup": math.exp(centre),
        "low": math.exp(centre - width),
        "high": math.exp(centre + width),
        "basis": basis,
    }


def _t(confidence: float, degrees: float) -> float:
    return float(stdtrit(degrees, 0.5 + confidence / 2))


def _iterations_width(sides: list[list[np.ndarray]], confidence: float) -> float | None:
    """Half-width of the interval from the noise of iterations; None if a run has one sample."""
    if any(len(run) < 2 for side in sides for run in side):
        return None
    terms = [
        (_MEDIAN_LOSS**2 * run.var(ddof=1) / len(run) / len(side) ** 2, len(run) - 1) for side in sides for run in side
    ]
    variance = sum(term for term, _ in terms)
    if variance == 0:
        return 0.0
    degrees = variance**2 / sum(term**2 / count for term, count in terms)
    return _t(confidence, degrees) * math.sqrt(variance)


def _runs_width(medians: list[np.ndarray], confidence: float) -> float | None:
    """Half-width of the interval from the differences between runs; None if a side has one run."""
    if any(len(side) < 2 for side in medians):
        return None
    degrees = sum(len(side) - 1 for side in medians)
    pooled = sum(float(((side - side.mean()) ** 2).sum()) for side in medians) / degrees
    return _t(confidence, degrees) * math.sqrt(pooled * sum(1 / len(side) for side in medians))


def verdict(ratio: dict[str, Any]) -> str:
    """faster, slower, no difference found, or no confidence."""
    if math.isnan(ratio["low"]):
        return "no confidence"
    if ratio["low"] > 1:
        return "faster"
    return "slower" if ratio["high"] < 1 else "no difference found"


def default_baseline(df: pd.DataFrame, by: str) -> str:
    """The baseline option: a DRAM-only or the default policy, else the option with most ok rows."""
    labels = option_label(df, by)
    if by == "numa":
        for name in _BASELINES:
            if (labels[df["ok"]] == name).any():
                return name
    counts = labels[df["ok"]].value_counts() if df["ok"].any() else labels.value_counts()
    return str(min(counts.index, key=lambda name: (-counts[name], str(name)))) if len(counts) else ""


def _matched_on(df: pd.DataFrame, by: str) -> pd.Series:
    """One string per row, equal for rows that differ in nothing but `by`."""
    keys = [key for key in cell_keys(df) if key != by and not key.startswith(by + ".")]
    parts = [df[f"cfg.{key}"].map(text) for key in keys]
    parts.append(df["machine"])
    if by != "numa":
        parts.append(option_label(df, "numa"))  # no config key records an inherited policy
    joined = pd.Series("", index=df.index, dtype=object)
    for part in parts:
        joined = joined + "\x1f" + part.astype(object)
    return joined


def compare(
    df: pd.DataFrame, by: str = "numa", baseline: str | None = None, confidence: float = CONFIDENCE
) -> pd.DataFrame:
    """Each option of the config group or key `by` against `baseline`, between cells that differ in nothing else.

    Columns: machine, model, seq_len_tokens, policy, variant (of the cell), option, baseline, runs, baseline_runs,
    speedup (tokens/s over the baseline's tokens/s), low, high (its confidence interval; the statistic is described at the
    top of this module), basis, verdict (faster, slower, no difference found, no confidence, or what failed).
    Cells whose counterpart was never run are left out; cells that failed on either side stay, with the failure as verdict.

    Raises ResultsError that lists the options if no row has `baseline`.
    """
    columns = ["machine", "model", "seq_len_tokens", "policy", "variant", "option", "baseline"]
    columns += ["runs", "baseline_runs", "speedup", "low", "high", "basis", "verdict"]
    if df.empty:
        return pd.DataFrame(columns=columns)
    kept = live(df)
    kept = kept.assign(option=option_label(kept, by))
    options = list(dict.fromkeys(kept["option"]))
    baseline = default_baseline(kept, by) if baseline is None else baseline
    if baseline not in options:
        raise ResultsError(f"no row has {by}={baseline}; use one of {', '.join(options)}")
    found = []
    for _, group in kept.groupby(_matched_on(kept, by), sort=False):
        base = group[group["option"] == baseline]
        for option, rows in group.groupby("option", sort=True):
            if option == baseline or base.empty:
                continue
            first = rows.iloc[0]
            cell = {name: first[name] for name in columns[:5]}
            found.append(cell | {"option": option, "baseline": baseline} | _versus(rows, base, confidence))
    table = pd.DataFrame(found, columns=columns)
    return table.sort_values(
        ["machine", "model", "seq_len_tokens", "option", "variant"], kind="stable", ignore_index=True
    )


def _versus(rows: pd.DataFrame, base: pd.DataFrame, confidence: float) -> dict[str, Any]:
    ok, base_ok = rows[rows["ok"]], base[base["ok"]]
    ratio = speed_ratio(list(ok["sample_tokens_per_s"]), list(base_ok["sample_tokens_per_s"]), confidence)
    if len(ok) and len(base_ok):
        answer = verdict(ratio)
    else:
        here = "ok" if len(ok) else str(rows["failure"].iloc[-1])
        there = "ok" if len(base_ok) else str(base["failure"].iloc[-1])
        answer = f"{here}, baseline {there}"
    return {"runs": len(ok), "baseline_runs": len(base_ok), **ratio, "verdict": answer}


def diff(a: pd.DataFrame, b: pd.DataFrame, confidence: float = CONFIDENCE) -> pd.DataFrame:
    """What changed from rows `a` to rows `b`, one line per cell in either.

    Columns: the cell, status_a, status_b (`absent` if it was not run), tokens_per_s_a, tokens_per_s_b, speedup of b over
    a with low and high (as in `compare`), peak_host_gib_a and _b, peak_vram_gib_a and _b, change: faster, slower,
    no difference found, `ok -> timeout`, only in a, only in b, failed in both.
    The machine is part of a cell: the same cell on another machine is another cell.
    """
    names = ["tokens_per_s", "peak_host_gib", "peak_vram_gib"]
    columns = ["machine", "model", "seq_len_tokens", "policy", "variant", "status_a", "status_b"]
    columns += [f"{name}_{side}" for name in names for side in "ab"] + ["speedup", "low", "high", "basis", "change"]
    both = pd.concat([a.assign(side="a"), b.assign(side="b")], ignore_index=True)
    both = live(both)
    if both.empty:
        return pd.DataFrame(columns=columns)
    both = relabel(both)  # labels were computed within each folder; recompute them over both
    found = []
    for _, group in both.groupby(_matched_on(both, "none"), sort=False):
        line: dict[str, Any] = {name: group.iloc[0][name] for name in columns[:5]}
        sides = {side: group[group["side"] == side] for side in "ab"}
        oks = {side: rows[rows["ok"]] for side, rows in sides.items()}
        for side, rows in sides.items():
            status = "absent" if rows.empty else str(rows["status"].iloc[-1])
            line[f"status_{side}"] = "ok" if len(oks[side]) else status
            line[f"tokens_per_s_{side}"] = oks[side]["tokens_per_s"].median()
            line[f"peak_host_gib_{side}"] = oks[side]["peak_host_gib"].max()
            line[f"peak_vram_gib_{side}"] = oks[side]["peak_vram_gib"].max()
        ratio = speed_ratio(list(oks["b"]["sample_tokens_per_s"]), list(oks["a"]["sample_tokens_per_s"]), confidence)
        found.append(line | ratio | {"change": _change(line["status_a"], line["status_b"], ratio)})
    return pd.DataFrame(found, columns=columns).sort_values(columns[:5], kind="stable", ignore_index=True)


def simultaneous(comparisons: int) -> float:
    """The confidence of one interval if all are to hold at once with CONFIDENCE (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / comparisons


def gate(a: pd.DataFrame, b: pd.DataFrame, below: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`diff` with intervals that hold for all cells at once, and those of its lines that a gate refuses, with the column `why`:
    their speed-up is below `below` with confidence, or a cell that was ok in `a` is not in `b`."""
    table = diff(a, b)
    compared = int(table["speedup"].notna().sum())
    if compared > 1:
        table = diff(a, b, simultaneous(compared))
    lost = (table["status_a"] == "ok") & (table["status_b"] != "ok")
    slow = table["high"] < below
    refused = table[lost | slow]
    return table, refused.assign(why=["slower" if slow[index] else table["change"][index] for index in refused.index])


def _change(before: str, after: str, ratio: dict[str, Any]) -> str:
    if "absent" in (before, after):
        return "only in b" if before == "absent" else "only in a"
    if before != after:
        return f"{before} -> {after}"
    return verdict(ratio) if before == "ok" else "failed in both"
