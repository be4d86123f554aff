"""Rows of a results folder as one tidy DataFrame: the row's columns unchanged, and a few derived ones with units."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldft import results
from ldft.config import Config, Goal
from ldft.config.root import flatten
from ldft.errors import ResultsError
from ldft.preflight.fit import DoesNotFitError
from ldft.results import places
from multirun_analysis import options
from multirun_analysis.labels import text

# Keys that do not change what is measured (where results go, time limits, sampling intervals, repetition): rows that differ in
# nothing else measure the same thing.
SAME_CELL = (
    "results",
    "monitor",
    "rerun",
    "dry_run",
    "force",
    "sweep",
    "repeat",
    "system",
    "plan",  # what it chose has its own keys
    "asked",
    "launch.timeout_s",
    "train.iterations",
    "train.warmup_iterations",
    "train.seed",
)
# These have their own columns.
_NAMED = ("model", "numa", "seq_len", "launch.device")

# A default that more rows have than this is not named in labels: only what differs from it is.
_MOST = 2 / 3

# Labels of failed cells in figures.
FAILURE_LABELS = {"oom_device": "OOM", "oom_host": "host OOM"}
REFUSED = "does not fit"  # an invalid row that would have run out of memory


def load(path: str | Path) -> pd.DataFrame:
    """Every row of a results folder, oldest first, including failed rows; one row per attempt.

    Besides the columns of ldft.results (units in their names):

    model, policy, machine   short labels; `model` and `policy` include overridden keys (`tiny num_layers=1`)
    variant                  the remaining config keys that differ among the rows, `key=value`; empty if none differ
    seq_len_tokens           tokens per sequence
    ok                       status is ok
    superseded               a later attempt of the same run_id is ok, so this failure no longer counts
    apart                    refused for a value that no other row has, e.g. a mistyped one: excluded from labels and cells
    failure                  label of a failed row (`OOM`, `timeout`, ...), empty for an ok one
    sample_tokens_per_s      array: throughput of each iteration after warm-up
    forward_median_s, backward_median_s, step_median_s    medians after warm-up
    update_median_s, update_wait_median_s    the same of the fused step's update; NaN where another kernel updated, or none
    peak_vram_gib            largest peak_vram_allocated_gib of any rank; NaN without a GPU
    gpu_hours_per_billion_tokens    hours that all GPUs together take for 10^9 tokens at tokens_per_s; NaN without a GPU
    trace_file               the run's trace if it exists, else null; `traces.read(row)` reads it

    path: a results folder, or the folder or file of one run. Raises ResultsError if it does not exist. A folder without rows gives
    an empty frame with all columns.
    """
    folder = places.results_dir(Path(path))
    frame = results.read(path)
    frame = frame.sort_values(["started_at", "run_id", "attempt"], kind="stable", ignore_index=True)
    traces = [folder / name if isinstance(name, str) else None for name in frame["trace_path"]]
    files = [str(path) if path is not None and path.is_file() else None for path in traces]
    return _derived(_with_defaults(frame)).assign(trace_file=pd.Series(files, index=frame.index, dtype="object"))


def config_keys(frame: pd.DataFrame) -> list[str]:
    """Config keys (without `cfg.`) in the rows."""
    return [name.removeprefix("cfg.") for name in frame.columns if name.startswith("cfg.")]


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def cell_keys(frame: pd.DataFrame) -> list[str]:
    """Config keys that determine what is measured: rows that agree in all of them are repeats of one cell."""
    return [key for key in config_keys(frame) if not _under(key, SAME_CELL)]


def _with_defaults(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill config keys that older rows lack with today's default: runs behaved that way before the key existed.

    (If a key's meaning changes, ldft.config's identity version is increased instead. In a current row a key is null on
    purpose only if its default is null.)
    """
    defaults = flatten(Config())
    columns: dict[str, pd.Series] = {}
    for key in config_keys(frame):
        column = frame[f"cfg.{key}"].astype(object)
        default = defaults.get(key)
        missing = column.map(lambda value: value is None or (isinstance(value, float) and np.isnan(value)))
        columns[f"cfg.{key}"] = column.where(
            ~missing, pd.Series([default] * len(frame), index=frame.index, dtype=object)
        )
    # Build the frame at once: adding many columns one by one fragments it, and pandas warns.
    filled = pd.DataFrame(columns, index=frame.index)
    return pd.concat([frame.drop(columns=filled.columns), filled], axis=1)[list(frame.columns)]


def option_label(frame: pd.DataFrame, group: str) -> pd.Series:
    """Labels that distinguish the options of one config group (`numa`, `offload`) or key among these rows.

    A group with a `name` key or with options is labelled by name or option, plus the keys in which rows of one name differ, unless
    most have the default; other groups, and rows that match no option, by all keys that differ.
    """
    keys = [key for key in config_keys(frame) if _under(key, (group,))]
    # Seeds and counts in a group (`train.seed`) do not distinguish options, unless requested by name.
    keys = [key for key in keys if key == group or _under(group, SAME_CELL) or not _under(key, SAME_CELL)]
    if not keys:
        raise ResultsError(f"no config group or key '{group}' in these rows; use one of {_groups(frame)}")
    texts = pd.DataFrame({key: frame[f"cfg.{key}"].map(text) for key in keys})
    name = f"{group}.name"
    if group == "numa":
        texts[name] = _inherited(frame, texts[name])
    if keys == [group]:
        return texts[group]
    differing = [key for key in keys if texts[key].nunique() > 1]
    names = texts[name] if name in texts else options.names(texts, group)
    label = _joined(pd.Series("", index=frame.index, dtype=object), texts[differing or keys], group)
    named = names != ""
    if named.any():
        mine = texts[named]
        extra = [k for k in keys if k != name and (mine.groupby(names[named], sort=False)[k].nunique() > 1).any()]
        usual = {key: texts[key] == options.default_text(str(key)) for key in extra}
        shown = {key: ~_unnamed(same, same[named]) for key, same in usual.items()}
        label = label.mask(named, _joined(names, texts[extra], group, shown))
    return label


def _unnamed(usual: pd.Series, among: pd.Series) -> pd.Series:
    """Rows whose label leaves out what is usual: all that have it, if they are most."""
    return usual & (among.mean() > _MOST)


def option_name(group: str, option: str) -> str:
    """An option for display: `cxl_aware`, `checkpointing=gpu every=2`, `micro_batch_size=4`."""
    return option if group == "numa" or "=" in option.split(" ")[0] else f"{group}={option}"


def _inherited(frame: pd.DataFrame, names: pd.Series) -> pd.Series:
    """Policy names, where `default` also names the caller's policy: `numactl ... python -m ldft` does not run with the default."""
    if "numa_policy" not in frame.columns:
        return names
    caller = frame["numa_policy"].astype(object)
    known = caller.map(lambda value: isinstance(value, str) and value != "default") & (names == "default")
    return names.where(~known, "default: " + caller.map(str))


def _joined(first: pd.Series, others: pd.DataFrame, group: str, shown: dict[str, pd.Series] | None = None) -> pd.Series:
    label = first.astype(object)
    for key in others:
        part = f" {str(key).removeprefix(group + '.')}=" + others[key]
        label = label + (part.where(shown[key], "") if shown else part)
    return label.str.strip().astype(object)


def _groups(frame: pd.DataFrame) -> str:
    return ", ".join(sorted({key.split(".")[0] for key in config_keys(frame)}))


def differing(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Options and cell keys that differ and have no separate column: group or key -> a label for each row (`checkpointing=gpu`,
    `num_ranks=2`). Of keys that always differ together, only the first is there."""
    found: dict[str, pd.Series] = {}
    seen: list[pd.Series] = []
    grouped: set[str] = set()
    for key in cell_keys(frame):
        group = key.partition(".")[0]
        if _under(key, _NAMED) or group in grouped:
            continue
        if options.values_of(group) and f"cfg.{group}.name" not in frame:
            grouped.add(group)
            name = group
            values = option_label(frame, group).map(partial(option_name, group))
        else:
            # Shorten `optimizer.name` to `optimizer` and, in labels, `launch.num_ranks` to `num_ranks`.
            name = key.removesuffix(".name")
            values = name.rpartition(".")[2] + "=" + frame[f"cfg.{key}"].map(text)
        codes = pd.Series(pd.factorize(values)[0], index=frame.index)
        if codes.nunique() < 2 or any(codes.equals(other) for other in seen):
            continue
        seen.append(codes)
        found[name] = values
    return found


def _variant(frame: pd.DataFrame) -> pd.Series:
    """What differs, in one label, without what most rows left at its default. A plan's row is named by what was asked for, without
    any default, since all of them were the plan's to choose."""
    found = goals(frame)
    made = found != ""
    label = ("plan=" + found).where(made, "").astype(object)
    for name, values in differing(_before_plans(frame, made)).items():
        usual = values == options.default_label(name)
        label = label + " " + values.mask(_unnamed(usual, usual) | usual & made, "")
    return label.str.split().str.join(" ").astype(object)


def goals(frame: pd.DataFrame) -> pd.Series:
    """The goal of the plan that chose a row's values; empty if none did."""
    asked = frame["cfg.asked"] if "cfg.asked" in frame else pd.Series("", index=frame.index, dtype=object)
    found = asked.map(lambda text: _asked(text).get("plan.goal", ""))
    if "cfg.plan.goal" in frame:
        found = found.mask(found == Goal.auto.name, frame["cfg.plan.goal"])
    return found.where(found.isin([goal.name for goal in Goal if goal is not Goal.none]), "").astype(object)


def _asked(text: Any) -> dict[str, str]:
    return dict(json.loads(text)) if isinstance(text, str) and text else {}


def _before_plans(frame: pd.DataFrame, made: pd.Series) -> pd.DataFrame:
    """The rows with what was asked for in place of what a plan chose."""
    before: dict[str, dict[Any, Any]] = {}
    for index in frame.index[made]:
        for key, value in _asked(frame.at[index, "cfg.asked"]).items():
            # "auto": chosen by the machine, with a plan or without.
            if value != "auto" and not _under(key, SAME_CELL):
                before.setdefault(f"cfg.{key}", {})[index] = None if value == "null" else value
    changed = {}
    for name in before.keys() & set(frame.columns):
        changed[name] = pd.Series([before[name].get(i, v) for i, v in frame[name].items()], frame.index, dtype=object)
    return frame.assign(**changed) if changed else frame


def _for_memory(frame: pd.DataFrame) -> pd.Series:
    """Which of the refused rows would not have fit."""
    return frame["error_type"] == DoesNotFitError.__name__


def _apart(frame: pd.DataFrame) -> pd.Series:
    """Marks rows refused for a reason other than memory, with a cell-key value that occurs in no accepted row."""
    refused = (frame["status"] == "invalid") & ~_for_memory(frame)
    found = pd.Series(False, index=frame.index)
    for key in cell_keys(frame) if (~refused).any() else ():
        values = frame[f"cfg.{key}"].map(text)
        found |= refused & ~values.isin(values[~refused])
    return found


def relabel(frame: pd.DataFrame) -> pd.DataFrame:
    """Label model, policy and variant by what differs among exactly these rows; call it again after joining rows of two folders."""
    return frame.assign(model=option_label(frame, "model"), policy=option_label(frame, "numa"), variant=_variant(frame))


def _labelled(frame: pd.DataFrame, apart: pd.Series) -> pd.DataFrame:
    """The frame with labels by what differs among the rows that are not apart; rows apart get no labels."""
    labels = relabel(frame[~apart])[["model", "policy", "variant"]].reindex(frame.index, fill_value="")
    return pd.concat([frame, labels], axis=1)


def live(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that represent cells: without superseded failures, and without rows apart."""
    return frame[~frame["superseded"] & ~frame["apart"]]


def _machine(row: pd.Series) -> str:
    gpus = list(row.gpus) if isinstance(row.gpus, np.ndarray | list) else []
    cpu = row.cpu if isinstance(row.cpu, str) else "unknown machine"
    model = f"{len(gpus)} x {gpus[0]}" if row.device_type == "cuda" and gpus else cpu
    return f"{row.system} ({model})" if isinstance(row.system, str) and row.system else model


def after_warmup(row: pd.Series, name: str) -> np.ndarray:
    """A list column's samples after warm-up; empty if there are none."""
    values = row[name]
    if values is None or (isinstance(values, float) and np.isnan(values)):
        return np.empty(0)
    return np.asarray(values, dtype=float)[int(row.warmup_iterations or 0) :]


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _peak(values: Any) -> float:
    """The largest value of a list column; NaN if it is null, empty or zero (a CPU run reports no device memory)."""
    peak = max(values, default=0.0) if isinstance(values, np.ndarray | list) else 0.0
    return float(peak) if peak > 0 else float("nan")


def _gpu_hours(row: pd.Series) -> float:
    if row.device_type != "cuda":
        return float("nan")
    return float(row["cfg.launch.num_ranks"] * 1e9 / (3600 * row.tokens_per_s)) if row.tokens_per_s else float("nan")


def _derived(frame: pd.DataFrame) -> pd.DataFrame:
    rows = [row for _, row in frame.iterrows()]

    def column(values: list[Any], dtype: str = "object") -> pd.Series:
        return pd.Series(values, index=frame.index, dtype=dtype)

    samples = []
    for row in rows:
        times = after_warmup(row, "iteration_s")
        samples.append(row.tokens_per_iteration / times if len(times) else times)
    status = frame["status"].astype(object)
    ok = status == "ok"
    last_ok = frame[ok].groupby("run_id")["attempt"].max()
    newest = frame["run_id"].map(last_ok).astype("float64")
    failure = status.map(lambda value: "" if value == "ok" else FAILURE_LABELS.get(value, str(value)))
    failure = failure.mask((status == "invalid") & _for_memory(frame), REFUSED)
    medians = {
        f"{phase}_median_s": column([_median(after_warmup(row, f"{phase}_s")) for row in rows], "float64")
        for phase in ("forward", "backward", "step", "update", "update_wait")
    }
    apart = _apart(frame)
    return _labelled(frame, apart).assign(
        apart=apart,
        machine=column([_machine(row) for row in rows]),
        seq_len_tokens=frame["cfg.seq_len.tokens"].astype("int64"),
        ok=ok,
        superseded=(~ok & (newest > frame["attempt"])).astype(bool),
        failure=failure,
        sample_tokens_per_s=column(samples),
        peak_vram_gib=column([_peak(row.peak_vram_allocated_gib) for row in rows], "float64"),
        gpu_hours_per_billion_tokens=column([_gpu_hours(row) for row in rows], "float64"),
        **medians,
    )


def versions_of(frame: pd.DataFrame) -> list[str]:
    """The commits (12 digits, `+` for uncommitted changes) that the rows come from, in order of first appearance."""
    found: dict[str, None] = {}
    for commit, dirty in zip(frame["git_commit"], frame["git_dirty"], strict=True):
        name = commit[:12] + ("+" if dirty else "") if isinstance(commit, str) else "unknown"
        found.setdefault(name)
    return list(found)
