"""Rows made to order: real files with the real schema, values that a test chooses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from ldft.config import Config, run_id, to_dict
from ldft.config.root import flatten
from ldft.monitor import trace
from ldft.monitor.samples import Sample
from ldft.results import schema
from ldft.results.__main__ import main
from tests.analysis.tracked import LOSS, ODD, TIMES, Log
from tests.conftest import compose
from tests.synthetic_samples import whole_run

START = datetime(2026, 1, 1, tzinfo=UTC)


class Rows:
    """Writes rows into one results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._count = 0

    def add(
        self,
        *,
        model: str = "tiny",
        tokens: int = 1024,
        policy: str = "default",
        status: str = "ok",
        iteration_s: list[float] | None = None,
        seed: int = 0,
        attempt: int = 1,
        config: Callable[[Config], None] | None = None,
        newer: dict[str, tuple[pa.DataType, Any]] | None = None,
        without: tuple[str, ...] = (),
        samples: list[Sample] | None = None,
        **columns: Any,
    ) -> Path:
        """Add a row. `newer` adds columns that today's schema lacks, `without` leaves columns out as an older one would;
        `samples` are its trace."""
        built = Config()
        built.model.name, built.seq_len.tokens, built.numa.name, built.train.seed = model, tokens, policy, seed
        if config:
            config(built)
        times = [9.0, 9.0, *(iteration_s or [1.0, 1.0, 1.0])] if status == "ok" else None
        self._count += 1
        row: dict[str, Any] = {name: None for name in schema.schema().names}
        row |= {f"cfg.{key}": value for key, value in flatten(built).items()}
        row |= {
            "run_id": run_id(built),
            "config_json": json.dumps(to_dict(built)),
            "attempt": attempt,
            "started_at": START + timedelta(minutes=self._count),
            "device_type": "cpu",
            "cpu": "a CPU",
            "gpus": [],
            "status": status,
            "error_message": None if status == "ok" else f"made to be {status} [see the log]",
            "warmup_iterations": 2,
            "tokens_per_iteration": tokens,
            "git_commit": "0123456789abcdef",
            "git_dirty": False,
            "source_hash": "abc",
        }
        if times:
            median = sorted(times[2:])[len(times[2:]) // 2]
            speed = columns.get("tokens_per_iteration", tokens) / median
            row |= {"iteration_s": times, "iteration_median_s": median, "tokens_per_s": speed}
            for phase, part in (("forward", 0.3), ("backward", 0.6), ("step", 0.1)):
                row[f"{phase}_s"] = [part * time for time in times]
            row["peak_host_gib"] = 2.0
        row |= columns
        fields = [field for field in schema.schema() if field.name not in without]
        fields += [pa.field(name, kind) for name, (kind, _) in (newer or {}).items()]
        row |= {name: value for name, (_, value) in (newer or {}).items()}
        path = self.folder / row["run_id"] / f"attempt-{attempt}" / schema.ROW_FILE
        path.parent.mkdir(parents=True)
        if samples is not None:
            row["trace_path"] = str(path.parent.relative_to(self.folder) / trace.TRACE_FILE)
            with (self.folder / row["trace_path"]).open("wb") as file:
                trace.write(samples, file, {})
        chosen = pa.schema(fields)
        pq.write_table(pa.Table.from_pylist([{name: row[name] for name in chosen.names}], schema=chosen), path)
        return path


def settings(*overrides: str) -> dict[str, Any]:
    """What `Rows.add` takes for the config of a command line."""
    config = compose(*overrides)

    def all_of_it(built: Config) -> None:
        for one in fields(config):
            setattr(built, one.name, getattr(config, one.name))

    return dict(model=config.model.name, tokens=config.seq_len.tokens, policy=config.numa.name, config=all_of_it)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows(tmp_path / "results")


@pytest.fixture
def new_rows(tmp_path: Path) -> Callable[[str], Rows]:
    """More than one results folder."""
    return lambda name: Rows(tmp_path / name)


def drawn(figure: Figure | str) -> Figure:
    """The figure of rows that have something to draw."""
    assert isinstance(figure, Figure), figure
    return figure


def artists(figure: Figure) -> dict[str, list[Any]]:
    """Lines, bars and marks by their gid."""
    found: dict[str, list[Any]] = {}
    for artist in figure.findobj():
        if gid := artist.get_gid():
            found.setdefault(gid, []).append(artist)
    return found


def role(name: str, node: int, gib: float, share: float, asked: float | None) -> dict[str, Any]:
    """An entry of the column `roles`."""
    size = int(gib * 2**30)
    return dict(host="h", rank=0, role=name, bytes=size, node=node, share=share, requested_share=asked)


def node(number: int, total_gib: float) -> dict[str, Any]:
    """An entry of the column `nodes`."""
    return dict(host="h", node=number, huge_gib=0, heap_gib=0, stack_gib=0, private_gib=total_gib, total_gib=total_gib)


@pytest.fixture
def full_row(rows: Rows) -> Path:
    """A run with something in every part of a record."""
    rows.add(
        model="llama3_8b",
        policy="weighted_0_3",
        iteration_s=TIMES[2:],
        samples=whole_run(random.Random(1), 40),
        loss=LOSS,
        init_s=30.0,
        duration_s=100.0,
        nodes=[node(0, 1.5), node(3, 4.0)],
        roles=[role("momentum", 0, 4, 0.25, 0.25), role("momentum", 3, 4, 0.75, 0.75)],
        peak_vram_allocated_gib=[10.0, 12.0],
        notes=["first", ODD],
        versions={"torch": "2.11", "deepspeed": "0.19"},
        fused_step=True,
        skipped_updates=[0, 0, 0, 1, 0],
        config=lambda built: setattr(built.numa, "nodes", [0, 3]),
    )
    return rows.folder


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Log]:
    """The same in this process, which has the trackers loaded already."""
    before = dict(os.environ)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["ldft.results", "log", *words])
        capsys.readouterr()
        code = main()
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    yield run
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
