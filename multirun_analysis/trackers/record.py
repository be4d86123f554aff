"""What a tracker gets of one finished row, in the words that trackers have: parameters, metrics, series, tags, figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from matplotlib.figure import Figure

from ldft.errors import ResultsError
from ldft.monitor.trace import TRACE_FILE
from ldft.results import attempt, places
from ldft.results.schema import MEASURED, ROW_FILE
from multirun_analysis import figures, rows, style, tidy
from multirun_analysis.report import commands

# Columns with one value per iteration, and columns with one per rank, of which the largest is the metric.
SERIES = (
    *("iteration_s", "forward_s", "backward_s", "step_s", "update_s", "update_wait_s", "update_overlapped_gib"),
    *("loss", "learning_rate", "skipped_updates", "loss_tokens"),
)
PER_RANK = ("peak_vram_allocated_gib", "peak_vram_reserved_gib", "peak_rss_gib")
# Numbers that count or name, and measure nothing; each is a tag.
_NAMES = ("attempt", "repeat", "exit_code")
# What the analysis adds to a row.
_MEDIANS = ("forward_median_s", "backward_median_s", "step_median_s", "update_median_s", "update_wait_median_s")
# Of these a record has the content in another form, or a file.
_NOT_TAGS = ("config_json", "deepspeed_config_json", "predicted_host_json", "predicted_vram_json", "topology_json")

_Draw = Callable[[pd.DataFrame], Figure | str]
FIGURES: dict[str, _Draw] = {
    "phases": figures.phases,
    "memory_by_node": figures.memory_by_node,
    "memory_by_role": figures.memory_by_role,
    "placement": figures.placement,
    "memory_over_time": figures.memory_over_time,
    "devices_over_time": figures.devices_over_time,
}
"""Figures that say something about a single run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One attempt at one run."""

    name: str
    """`llama3_8b 32k weighted_0_3 offload=none`: with all that is not the default and says what was measured"""
    run_id: str
    attempt: int
    status: str
    started_at: datetime
    ended_at: datetime
    times: list[datetime]
    """The end of each iteration."""
    config: dict[str, str | int | float | bool]
    """Every config key of the row; lists as JSON, a null as `null`."""
    metrics: dict[str, float]
    series: dict[str, list[float]]
    """Column -> one value per iteration, warm-up included."""
    tags: dict[str, str]
    files: list[Path]
    """The row, the resolved config and the trace, as far as they are loose files."""
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        return f"{self.run_id}-{self.attempt}"


def records(path: Path, draw: bool = True) -> Iterator[Record]:
    """A record of each row of a results folder, or of the folder or file of one run, oldest first. draw: with figures.

    An attempt's folder may be empty by now, because its row was merged into a larger file. Raises ResultsError as `rows.load` does,
    and if there is no row.
    """
    loaded, folder = rows.load(path), places.results_dir(path)
    of_attempt = re.fullmatch(r"attempt-(\d+)", path.name)
    if loaded.empty and of_attempt:
        folder = path.absolute().parents[1]
        loaded = rows.load(folder)
        named = (loaded["run_id"] == path.absolute().parent.name) & (loaded["attempt"] == int(of_attempt[1]))
        loaded = loaded[named]
    if loaded.empty:
        raise ResultsError(places.missing(path))
    for position in range(len(loaded)):
        yield of(loaded.iloc[[position]], folder, draw)


def of(frame: pd.DataFrame, results_dir: Path, draw: bool = True) -> Record:
    """The record of a frame with one row."""
    frame = rows.relabel(frame.assign(apart=False, superseded=False))  # alone: its figures name no other rows
    row = frame.iloc[0]
    started = row["started_at"].to_pydatetime().astimezone(UTC)
    series = {name: values for name in SERIES if (values := _numbers(row[name]))}
    begun = _number(row["init_s"]) or 0.0
    ends = accumulate(series.get("iteration_s", []), initial=begun)
    next(ends)
    own = attempt.folder_of(results_dir, row["run_id"], int(row["attempt"]))
    return Record(
        name=_name(row),
        run_id=row["run_id"],
        attempt=int(row["attempt"]),
        status=row["status"],
        started_at=started,
        ended_at=started + timedelta(seconds=_number(row["duration_s"]) or 0.0),
        times=[started + timedelta(seconds=s) for s in ends],
        config={key: _plain(row[f"cfg.{key}"]) for key in rows.config_keys(frame)},
        metrics=_metrics(frame, row),
        series=series,
        tags=_tags(row),
        files=[own / name for name in (ROW_FILE, "config.json", TRACE_FILE) if (own / name).is_file()],
        figures=_figures(frame) if draw else {},
    )


def _name(row: pd.Series) -> str:
    """Of the row alone: it does not depend on the rows beside it, and tells it from those of its sweep."""
    name = f"{row['cfg.model.name']} {style.length(row['seq_len_tokens'])} {row['cfg.numa.name']}"
    config = json.loads(row["config_json"]) if isinstance(row["config_json"], str) else {}
    try:
        words = commands.overrides(config)
    except commands.NoCommandError:  # of another version; its command would fail, its name need not
        words = []
    keys = [(word, word.partition("=")[0]) for word in words]
    left_out = ("model", "seq_len", "numa", *rows.SAME_CELL, *config.get("asked", {}))
    return " ".join(
        [name, *(word for word, key in keys if key not in left_out and key.partition(".")[0] not in left_out)]
    )


def _figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Those that have something to show; of a failed run, the ones over time alone."""
    ok = bool(frame["ok"].iloc[0])
    made = {name: make(frame) for name, make in FIGURES.items() if ok or name.endswith("_over_time")}
    return {name: figure for name, figure in made.items() if isinstance(figure, Figure)}


def _metrics(frame: pd.DataFrame, row: pd.Series) -> dict[str, float]:
    names = [one.name for one in MEASURED if _is_number(one.type) and one.name not in _NAMES]
    found = {name: _number(row[name]) for name in (*names, *_MEDIANS)}
    found |= {name: max(_numbers(row[name]), default=None) for name in PER_RANK}
    nodes = tidy.memory_by_node(frame).groupby(["host", "node"])["total_gib"].sum()
    several = nodes.index.get_level_values("host").nunique() > 1
    for (host, node), size in nodes.items():
        found[f"memory/{f'{host}/' if several else ''}node{node}_gib"] = float(size)
    for (host, role, node), size in tidy.memory_by_role(frame).groupby(["host", "role", "node"])["gib"].sum().items():
        found[f"roles/{f'{host}/' if several else ''}{role}/node{node}_gib"] = float(size)
    return {name: value for name, value in found.items() if value is not None}


def _tags(row: pd.Series) -> dict[str, str]:
    """The row's texts, names and truths."""
    found: dict[str, str] = {}
    for one in MEASURED:
        value = row[one.name]
        if one.name in _NAMES and _number(value) is not None:
            found[one.name] = str(int(value))
        elif pa.types.is_string(one.type) and one.name not in _NOT_TAGS and isinstance(value, str) and value:
            found[one.name] = value
        elif pa.types.is_boolean(one.type) and isinstance(value, bool | np.bool_):
            found[one.name] = str(bool(value)).lower()
        elif pa.types.is_list(one.type) and pa.types.is_string(one.type.value_type) and _present(value) and len(value):
            found[one.name] = "; ".join(value)
        elif pa.types.is_map(one.type) and _present(value):
            found |= {f"{one.name}.{name}": text for name, text in dict(value).items() if text}
    return found


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _present(value: Any) -> bool:
    return isinstance(value, np.ndarray | list | tuple | dict)


def _number(value: Any) -> float | None:
    """A number of a row; None for null and NaN."""
    return None if value is None or pd.isna(value) else float(value)


def _numbers(values: Any) -> list[float]:
    """A list of a row; empty for null."""
    return [float(value) for value in values] if _present(values) else []


def _plain(value: Any) -> str | int | float | bool:
    if _present(value):
        return json.dumps([_plain(one) for one in value])
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "null"
    plain: str | int | float | bool = value.item() if isinstance(value, np.generic) else value
    return plain
