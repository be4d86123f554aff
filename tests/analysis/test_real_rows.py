"""Rows of real runs, ok and failed, through every table and figure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from multirun_analysis import cells, compare, load, memory_by_node, phases
from multirun_analysis.__main__ import main
from multirun_analysis.figures import throughput
from tests.analysis.conftest import artists, drawn
from tests.conftest import long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@long
def test_real_rows_become_tables_and_figures(ldft, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, code in ((("checkpointing=none",), 0), ((), 0), (("seq_len.tokens=128", "launch.timeout_s=0.5"), 1)):
        done = ldft(*overrides)
        assert done.exit_code == code, done.stdout + done.stderr
    shutil.copytree(done.results_dir, folder, dirs_exist_ok=True)
    df = load(folder)
    table = cells(df)
    assert table[["seq_len_tokens", "variant", "failure"]].values.tolist() == [
        [64, "checkpointing=cpu", ""],
        [64, "checkpointing=none", ""],
        [128, "checkpointing=cpu", "timeout"],
    ]
    ok = df[df.ok]
    # The phases of a real run make up its iterations, within what medians of parts may differ.
    assert phases(df).groupby(["variant"]).seconds.sum().tolist() == pytest.approx(
        [ok[ok.variant == variant].iteration_median_s.item() for variant in sorted(ok.variant)]
    )
    line = compare(df, by="checkpointing", baseline="cpu").iloc[0]
    expected = ok.set_index("variant").tokens_per_s
    assert line.speedup == pytest.approx(expected["checkpointing=none"] / expected["checkpointing=cpu"])
    figure = artists(drawn(throughput(df)))
    (points,) = figure["ok|nano|checkpointing=none"]
    assert list(points.get_ydata()) == [expected["checkpointing=none"]]
    marks = [mark for gid, marks in figure.items() if gid.startswith("failed") for mark in marks]
    assert [list(mark.get_xdata()) for mark in marks] == [[128]]
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 rows: 2 ok, 1 timeout" in out
    assert {path.name for path in (folder / "figures").glob("*.png")} >= {
        "throughput.png",
        "phases.png",
        "peak_memory.png",
    }
    if len(memory_by_node(df)):
        assert (folder / "figures" / "memory_by_node.png").exists()
