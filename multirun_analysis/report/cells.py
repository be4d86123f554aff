"""What the page knows of the rows: one entry a cell, with the numbers of multirun_analysis.tidy and each run's own words."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from multirun_analysis import labels, rows, tidy
from multirun_analysis.report import commands, over_time

# Of a line of `tidy.cells`, under the same names.
_NUMBERS = (
    *("tokens_per_s", "tokens_per_s_p10", "tokens_per_s_p90", "iteration_s", "forward_s", "backward_s", "step_s"),
    *("peak_host_gib", "peak_vram_gib", "mfu", "gpu_hours_per_billion_tokens"),
)
_TEXTS = ("machine", "model", "policy", "variant", "status", "failure")
# Of a row, in its own words.
_OWN = (
    *("run_id", "attempt", "status", "started_at", "tokens_per_s", "error_type", "error_message", "log_path", "notes"),
    *("config_json", "numa_policy", "cfg.numa.name", "machine", "hosts", "gpus", "driver", "cpu", "num_cores"),
    *("host_memory_gib", "kernel", "git_commit", "git_dirty", "versions"),
)
_NO_COMMAND = "no command: the row does not hold its complete config"
_ANOTHER_ID = "The settings are the row's. It is from an older version of ldft, so the new run gets another run_id."


def cells(df: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry a cell, and one for each row that is none: refused for a mistyped value, or with no sequence length.

    df: loaded rows. Numbers that were not measured are None. `runs` are the cell's attempts, newest first; `options` its labels in
    what differs among the rows (rows.differing); `nodes`, `memory` and `times` the medians over its runs.
    """
    runs = _Runs(df)
    live = rows.live(df)
    members = live[live["seq_len_tokens"] > 0].groupby(tidy.CELL, sort=True).groups
    found = [
        _numbers(line) | runs.of(members[tuple(line[name] for name in tidy.CELL)])
        for line in tidy.cells(df).to_dict("records")
    ]
    others = df[~df["superseded"] & (df["apart"] | (df["seq_len_tokens"] <= 0))]
    for index, row in others.iterrows():
        named = {"model": str(row["cfg.model.name"]), "policy": str(row["cfg.numa.name"])}
        found.append(_numbers(row.to_dict() | named) | runs.of([index]))
    return found


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    texts = {name: str(line[name]) for name in _TEXTS}
    numbers = {name: number(line.get(name)) for name in _NUMBERS}
    return texts | {"tokens": int(line["seq_len_tokens"])} | numbers


def number(value: Any) -> float | None:
    """A number that JSON can hold, in six digits; None for what was not measured."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, np.ndarray | list) else []


class _Runs:
    """The rows' own words and entries, by row and by run."""

    def __init__(self, df: pd.DataFrame) -> None:
        self._runs = dict(zip(df.index, map(_run, df[list(_OWN)].to_dict("records")), strict=True))
        self._refused = set(df.index[df["failure"] == rows.REFUSED])
        kept = df[~df["apart"]]
        self._options = {name: values.to_dict() for name, values in rows.differing(kept).items()}
        if (goals := rows.goals(kept)).nunique() > 1:
            self._options["plan"] = ("plan=" + goals.replace("", "none")).to_dict()
        # The model's own keys, a dozen for each, are its name; the length has its column.
        keys = [key for key in rows.cell_keys(df) if not key.startswith(("model.", "seq_len."))]
        texts = {key: df[f"cfg.{key}"].map(labels.text) for key in keys}
        self._config = {key: values.to_dict() for key, values in texts.items() if values.nunique() > 1}
        self._nodes = _by_run(_memory_by_node(df), ("node",), ("total_gib",))
        self._memory = _by_run(tidy.predicted(df), ("quantity",), ("predicted_gib", "measured_gib"))
        self._times = _by_run(tidy.predicted_times(df), ("quantity",), ("predicted_s", "measured_s"))
        self._traces = over_time.of_cells(df)

    def of(self, members: Sequence[Any]) -> dict[str, Any]:
        """The part of an entry that its rows give."""
        attempts = [self._runs[index] for index in reversed(members)]
        runs = [(run["run_id"], run["attempt"]) for run in attempts]
        options = {name: values[members[0]] for name, values in self._options.items() if members[0] in values}
        failed = next((index for index in reversed(members) if self._runs[index]["status"] != "ok"), None)
        return {
            "id": attempts[0]["run_id"],
            "refused_for_memory": failed in self._refused,
            "options": options,
            "config": {key: values[members[0]] for key, values in self._config.items()},
            "nodes": _medians(self._nodes, runs),
            "memory": _medians(self._memory, runs),
            "times": _medians(self._times, runs),
            "trace": next((self._traces[run] for run in runs if run in self._traces), None),
            "runs": attempts,
        }


def _memory_by_node(df: pd.DataFrame) -> pd.DataFrame:
    """With the host in the node's name where several hosts ran ranks: their nodes 0 are not one."""
    table = tidy.memory_by_node(df)
    several = table.groupby(["run_id", "attempt"])["host"].transform("nunique") > 1 if len(table) else False
    names = "node " + table["node"].astype(str)
    return table.assign(node=names.where(~several, table["host"].astype(str) + " " + names) if len(table) else names)


def _by_run(
    table: pd.DataFrame, names: tuple[str, ...], values: tuple[str, ...]
) -> dict[Any, dict[str, tuple[float, ...]]]:
    """(run_id, attempt) -> name -> values."""
    found: dict[Any, dict[str, tuple[float, ...]]] = defaultdict(dict)
    for line in table.to_dict("records"):
        found[line["run_id"], line["attempt"]][line[names[0]]] = tuple(float(line[value]) for value in values)
    return found


def _medians(by_run: dict[Any, dict[str, tuple[float, ...]]], runs: list[Any]) -> list[list[Any]]:
    """[name, median of each value] over the runs that have the name."""
    gathered: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for run in runs:
        for name, values in by_run.get(run, {}).items():
            gathered[name].append(values)
    return [[name, *(number(value) for value in np.median(values, axis=0))] for name, values in gathered.items()]


def _run(row: dict[str, Any]) -> dict[str, Any]:
    commit = row["git_commit"]
    command, note = _command(row)
    return {
        "run_id": str(row["run_id"]),
        "attempt": int(row["attempt"]),
        "status": str(row["status"]),
        "started": None if pd.isna(row["started_at"]) else f"{row['started_at']:%Y-%m-%d %H:%M:%S} UTC",
        "tokens_per_s": number(row["tokens_per_s"]),
        "error": _text(row["error_type"]),
        "message": _text(row["error_message"]),
        "log": _text(row["log_path"]),
        "notes": [str(note) for note in _items(row["notes"])],
        "command": command,
        "command_note": note,
        "environment": {
            "machine": str(row["machine"]),
            "hosts": ", ".join(map(str, _items(row["hosts"]))) or None,
            "GPUs": ", ".join(map(str, _items(row["gpus"]))) or "none",
            "driver": _text(row["driver"]),
            "CPU": _text(row["cpu"]),
            "cores of the run": number(row["num_cores"]),
            "host memory, GiB": number(row["host_memory_gib"]),
            "kernel": _text(row["kernel"]),
            "commit": commit[:12] + (" with uncommitted changes" if row["git_dirty"] is True else "")
            if isinstance(commit, str)
            else None,
            "versions": ", ".join(f"{name} {version}" for name, version in _items(row["versions"])) or None,
        },
    }


def _command(row: dict[str, Any]) -> tuple[str | None, str | None]:
    """The command that runs the row's config again, and what to know about it; without one, why."""
    if not isinstance(row["config_json"], str):
        return None, _NO_COMMAND
    config = json.loads(row["config_json"])
    try:
        command = commands.command(config)
        notes = [] if commands.gives_run_id(config, str(row["run_id"])) else [_ANOTHER_ID]
    except commands.NoCommandError as error:
        return None, f"no command: {error}"
    caller = row["numa_policy"]
    if row["cfg.numa.name"] == "default" and isinstance(caller, str) and caller != "default":
        notes.append(
            f"The run inherited its memory policy, {caller}, from its caller: start the command under numactl."
        )
    return command, " ".join(notes) or None
