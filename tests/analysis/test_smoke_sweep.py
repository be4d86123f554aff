"""The whole way: a real sweep of twelve cells and one run that fails, through tables, figures and the notebook."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from multirun_analysis import load
from multirun_analysis.__main__ import main
from multirun_analysis.figures import throughput
from multirun_analysis.notebooks import execute
from tests.analysis.conftest import artists, drawn
from tests.conftest import long


def ldft(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ldft", *arguments, "launch.device=cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


@long
def test_a_smoke_sweep_and_a_failed_run_become_figures_and_a_notebook(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    swept = ldft("-m", "+sweep=smoke", f"results.dir={folder}")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    failed = ldft(
        "model=nano",
        "seq_len=4k",
        "train.iterations=3",
        "train.warmup_iterations=1",
        "launch.timeout_s=0.5",
        f"results.dir={folder}",
    )
    assert failed.returncode == 1
    df = load(folder)
    assert df.status.value_counts().to_dict() == {"ok": 12, "timeout": 1}

    points = {}
    figure = artists(drawn(throughput(df)))
    for gid, (artist, *_) in figure.items():
        kind, *cell = gid.split("|")
        if kind == "ok":
            points[tuple(cell)] = dict(zip(map(int, artist.get_xdata()), artist.get_ydata(), strict=True))
    ok = df[df.ok]
    # Each point against its row: figures may move a marker aside by a little, not the value.
    values = sorted(value for line in points.values() for value in line.values())
    assert values == pytest.approx(sorted(ok.tokens_per_s)) and len(values) == 12
    for model in ("nano", "tiny"):
        mine = sorted(value for cell, line in points.items() if cell[0] == model for value in line.values())
        assert mine == pytest.approx(sorted(ok[ok.model == model].tokens_per_s))
    marks = [mark for gid, marks in figure.items() if gid.startswith("failed") for mark in marks]
    assert [list(mark.get_xdata()) for mark in marks] == [[4096]]

    assert main([str(folder)]) == 0
    written = {path.name for path in (folder / "figures").iterdir()}
    assert {f"{name}.{kind}" for name in ("throughput", "phases", "peak_memory") for kind in ("png", "svg")} <= written

    start = time.monotonic()
    execute("analysis.ipynb", results=folder)
    assert time.monotonic() - start < 60
