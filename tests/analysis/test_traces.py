"""Traces as tables and figures: sums, phases and peaks are those of the samples; runs without a trace are no hindrance."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ldft.errors import ResultsError
from ldft.monitor import trace
from ldft.monitor.samples import Sample
from multirun_analysis import load, traces
from multirun_analysis.__main__ import main
from multirun_analysis.figures import devices_over_time, memory_over_time
from tests.analysis.conftest import Rows, artists, drawn
from tests.synthetic_samples import whole_run

GIB = 1 << 30


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return whole_run(random.Random(1))


def add(rows: Rows, samples: list[Sample]) -> Path:
    """A row with a trace beside it; returns the trace."""
    row = rows.add(policy="weighted_0_3", device_type="cuda", peak_host_gib=320.0, samples=samples)
    return row.parent / trace.TRACE_FILE


def test_tables_are_the_sums_of_the_samples(rows, samples) -> None:
    add(rows, samples)
    (row,) = [row for _, row in load(rows.folder).iterrows()]
    read = traces.read(row)
    assert len(read) == len(samples) and read["elapsed_s"].iloc[0] == 0
    by_node, by_role = traces.memory_by_node(read), traces.memory_by_role(read)
    # Every second sample has an older reading; the last sample counts nevertheless.
    assert list(by_node.columns) == [0, 1, 2, 3] and len(by_node) == 61
    ranks = samples[100].runs[0].ranks
    at = read["elapsed_s"].iloc[100]
    for node in range(4):
        expected = sum(dict(rank.memory)[node] for rank in ranks) / GIB
        assert by_node.loc[at, node] == pytest.approx(expected, abs=0.01)
    momentum = sum(use.size for rank in ranks for use in rank.roles if use.role == "momentum") / GIB
    assert by_role.loc[at, "momentum"] == pytest.approx(momentum)
    assert by_role.sum(axis=1).loc[at] == pytest.approx(by_node.sum(axis=1).loc[at])
    devices = traces.devices(read)
    assert len(devices) == 2 * len(samples)
    one = devices[(devices["elapsed_s"] == at) & (devices["rank"] == 1)].iloc[0]
    assert one.vram_used_gib == pytest.approx(ranks[1].device.vram_used / GIB, abs=0.01)
    assert one.pcie_rx_gb_per_s == pytest.approx(ranks[1].device.pcie_rx_kb_per_s / 1e6, abs=0.01)
    found = traces.phases(read)
    assert list(found["phase"]) == ["start", "imports", "operators", "model", "engine", "train"]
    assert found["begin_s"].iloc[1] == pytest.approx(8, abs=0.1) and (found["end_s"] >= found["begin_s"]).all()


def test_the_figure_names_the_peak_and_marks_the_phases(rows, samples) -> None:
    add(rows, samples)
    df = load(rows.folder)
    figure = drawn(memory_over_time(df))
    by_node = traces.memory_by_node(traces.read(df.iloc[0])).sum(axis=1)
    found = artists(figure)
    assert {"area|node 0", "area|node 3", "area|momentum", "area|other", "phase|train"} <= set(found)
    peak = found["peak"][0].get_xydata()[0]
    assert tuple(peak) == (by_node.idxmax(), by_node.max())
    assert [text.get_text() for text in figure.axes[1].texts] == ["start", "model", "training"]
    title = " ".join(figure.get_suptitle().split())
    assert title.startswith("Host memory of tiny 1k weighted_0_3 peaks at ") and "in iteration" in title
    assert title.split(" peaks at ")[1].startswith(f"{by_node.max():.0f} GiB")
    # The highest area of the nodes ends where their sum is.
    tops = found["area|node 3"][0].get_paths()[0].vertices[:, 1]
    assert tops.max() == pytest.approx(by_node.max())


def test_no_text_of_the_figures_lies_over_another(rows, samples) -> None:
    add(rows, samples)
    for draw in (memory_over_time, devices_over_time):
        figure = drawn(draw(load(rows.folder)))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axes in figure.axes:
            boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts if text.get_text()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_devices_are_drawn_of_every_rank(rows, samples) -> None:
    add(rows, samples)
    figure = drawn(devices_over_time(load(rows.folder)))
    found = artists(figure)
    assert {"vram|0", "vram|1", "pcie|rx", "pcie|tx"} <= set(found)
    both = [rank.device.pcie_tx_kb_per_s // 1000 for rank in samples[7].runs[0].ranks]
    assert found["pcie|tx"][0].get_ydata()[7] == pytest.approx(sum(both) / 1000)


def test_without_a_trace_a_sentence_stands_in_its_place(rows, samples) -> None:
    rows.add()
    df = load(rows.folder)
    assert (
        memory_over_time(df)
        == devices_over_time(df)
        == ("no row has a trace; runs leave one with monitor.interval_s above 0")
    )
    path = add(rows, samples)
    drawn(memory_over_time(load(rows.folder)))
    whole = path.read_bytes()
    # Torn, with a column's name changed, and with a text and a name that are not UTF-8.
    for damaged in (
        b"PAR1 torn",
        *(whole.replace(b"phase", new) for new in (b"phasf", b"phas\x9a")),
        whole.replace(b"train", b"\xfftra\xff"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ResultsError, match=r"cannot read .*trace\.parquet.*; run the cell again"):
            memory_over_time(load(rows.folder))
    path.unlink()
    assert isinstance(memory_over_time(load(rows.folder)), str)


def test_the_command_writes_both(rows, samples, tmp_path, capsys) -> None:
    add(rows, samples)
    assert main([str(rows.folder), "--out", str(tmp_path / "figures")]) == 0
    for name in ("memory_over_time.png", "devices_over_time.svg"):
        assert (tmp_path / "figures" / name).stat().st_size > 10_000
