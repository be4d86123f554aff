"""The figures' data, read back from the artists: right rows at right places, failed cells visible, files reproducible."""

from __future__ import annotations

import itertools
import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldft.config import Config
from multirun_analysis import load, style
from multirun_analysis.figures import FIGURES, groups_to_compare, speedup, write_all
from tests.analysis.conftest import Rows, artists, drawn, node, role
from tests.conftest import options
from tests.synthetic_samples import whole_run

LENGTHS = (4096, 8192, 16384)


def _artist(figure: Figure, gid: str) -> Any:
    found = artists(figure)
    assert len(found.get(gid, [])) == 1, f"{len(found.get(gid, []))} artists {gid}; there are {sorted(found)}"
    return found[gid][0]


def _title(figure: Figure) -> str:
    return " ".join(figure.get_suptitle().split())


@pytest.fixture(scope="module")
def df(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two models, three policies, three lengths; one length of the default runs out of device memory, one times out."""
    rows = Rows(tmp_path_factory.mktemp("figures") / "results")
    speeds = {"default": 1.0, "cxl_aware": 1.1, "naive_interleaving": 0.8}
    for model, base in (("llama3_8b", 1000), ("qwen2_5_7b", 2000)):
        for tokens in LENGTHS:
            for policy, speed in speeds.items():
                status = "ok"
                if tokens == 16384 and policy == "default":
                    status = "oom_device" if model == "llama3_8b" else "timeout"
                time = tokens / (base * speed)
                gib = tokens / 1024
                placed = [role("momentum", 0, 3, 0.26, 0.25), role("momentum", 3, 3, 0.74, 0.75)]
                ok = status == "ok"
                rows.add(
                    model=model,
                    tokens=tokens,
                    policy=policy,
                    status=status,
                    iteration_s=[time, time * 1.01, time * 0.99],
                    device_type="cuda",
                    gpus=["GPU"],
                    peak_vram_allocated_gib=[gib] if ok else None,
                    peak_host_gib=2 * gib,
                    nodes=[node(0, gib), node(3, 2 * gib)] if ok else None,
                    roles=placed if ok else None,
                    predicted_host_gib=2.2 * gib,
                    predicted_iteration_s=0.9 * time,
                    predicted_forward_s=0.3 * time,
                    predicted_vram_gib=gib,
                    samples=whole_run(random.Random(0)) if ok and gib == 16 else None,
                )
    return load(rows.folder)


def test_throughput_has_each_cell_at_its_length(df) -> None:
    figure = drawn(FIGURES["throughput"](df))
    line = _artist(figure, "ok|llama3_8b|cxl_aware")
    # Neighbouring points are shifted by less than a tenth of a doubling.
    assert [round(x) for x in line.get_xdata()] == pytest.approx(LENGTHS, rel=0.1)
    assert line.get_ydata() == pytest.approx([1100] * 3)
    assert _artist(figure, "ok|qwen2_5_7b|naive_interleaving").get_ydata() == pytest.approx([1600] * 3)
    assert list(_artist(figure, "ok|llama3_8b|default").get_ydata()) == pytest.approx([1000, 1000])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["llama3_8b", "qwen2_5_7b"]
    assert all(axes.get_xscale() == "log" for axes in figure.axes)
    assert _title(figure) == (
        "Highest median throughput: cxl_aware, in 6 of 6 pairs of model and length; 2 of 18 cells failed (OOM, timeout)"
    )


@pytest.mark.parametrize("name", ["throughput", "peak_memory"])
def test_failed_cells_are_marked_at_their_length_in_their_colour(df, name: str) -> None:
    figure = drawn(FIGURES[name](df))
    marks = {gid for gid in artists(figure) if gid.startswith("failed")}
    assert marks == {"failed|llama3_8b|default|OOM", "failed|qwen2_5_7b|default|timeout"}
    mark = artists(figure)["failed|llama3_8b|default|OOM"][0]
    assert list(mark.get_xdata()) == [16384] and mark.get_color() == style.POLICIES["default"][0]
    low, high = mark.axes.get_ylim()
    assert low < mark.get_ydata()[0] < 0 < high
    words = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert words == {"OOM", "timeout"}


def test_phases_are_bars_of_the_median_seconds(df) -> None:
    figure = drawn(FIGURES["phases"](df))
    bars = artists(figure)["16k cxl_aware|backward"]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.6 * 16384 / 1100, 0.6 * 16384 / 2200])
    assert [bar.get_x() for bar in bars] == pytest.approx([0.3 * 16384 / 1100, 0.3 * 16384 / 2200])
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "OOM" in notes and "timeout" in notes and "14.9 s" in notes
    assert _title(figure).startswith("Backward takes 60% of an iteration")


def test_phases_show_the_update_beside_them_and_what_training_waited_for(rows) -> None:
    """Overlapped from the start of the iteration, else at the end of the step; rows without these columns have no thin bar."""

    def steps(overlap: bool) -> Any:
        return lambda config: setattr(config.optimizer, "overlap_step", overlap)

    parts = {"forward_s": [1.0] * 5, "backward_s": [2.0] * 5, "step_s": [0.75] * 5, "iteration_s": [4.0] * 3}
    measured = {"update_s": [9.0, 9.0, 0.5, 0.5, 0.8], "update_wait_s": [0.125] * 5}
    rows.add(config=steps(True), **parts, **measured, overlap_step=True)
    within = measured | {"update_wait_s": measured["update_s"]}
    rows.add(config=steps(False), **parts, **within, overlap_step=False)
    rows.add(tokens=2048, **parts, without=("update_s", "update_wait_s", "overlap_step"))
    table = load(rows.folder)
    figure = drawn(FIGURES["phases"](table))

    def spans(label: str) -> list[tuple[float, float]]:
        names = ("update", "update waited for")
        return [(bar.get_x(), bar.get_width()) for bar in (_artist(figure, f"{label}|{name}") for name in names)]

    assert spans("1k overlap_step=True") == [(0, 0.375), (0.375, 0.125)]
    assert spans("1k overlap_step=False") == [(3.25, 0), (3.25, 0.5)]
    assert "2k overlap_step=auto|update" not in artists(figure) and "2k overlap_step=auto|step" in artists(figure)
    hatched = _artist(figure, "1k overlap_step=True|update waited for")
    assert hatched.get_hatch() and not _artist(figure, "1k overlap_step=True|update").get_hatch()
    phase = _artist(figure, "1k overlap_step=True|forward")
    assert hatched.get_y() == pytest.approx(phase.get_y() + phase.get_height())
    assert _title(figure).endswith("of an update beside the next forward pass, training waits for 25%")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-2:] == ["update", "update, training waits"]
    old = drawn(FIGURES["phases"](table[table["seq_len_tokens"] == 2048]))
    assert "update" not in [text.get_text() for text in old.legends[0].get_texts()]
    assert "update" not in _title(old)


def test_speedup_is_over_the_baseline_and_fills_what_differs(df) -> None:
    figure = drawn(speedup(df))
    line = _artist(figure, "speedup|llama3_8b|cxl_aware")
    assert line.get_ydata() == pytest.approx([1.1, 1.1])  # no baseline at 16k: it failed there
    assert len(_artist(figure, "differs|llama3_8b|cxl_aware").get_ydata()) == 2
    assert len(_artist(figure, "same|llama3_8b|cxl_aware").get_ydata()) == 0
    assert (
        _title(figure) == "Up to 1.10 times as fast as default: cxl_aware (llama3_8b 4k); of 8 pairs 4 faster, 4 slower"
    )


def test_peak_memory_shows_device_and_host(df) -> None:
    figure = drawn(FIGURES["peak_memory"](df))
    assert list(_artist(figure, "peak_vram_gib|llama3_8b|cxl_aware").get_ydata()) == [4, 8, 16]
    assert list(_artist(figure, "peak_host_gib|qwen2_5_7b|default").get_ydata()) == [8, 16]
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert labels == {"peak VRAM of a GPU (GiB)", "peak host memory (GiB)"}


def test_memory_by_node_and_role_are_stacked_bars(df) -> None:
    figure = drawn(FIGURES["memory_by_node"](df))
    bars = artists(figure)["8k default|node 3"]
    assert [bar.get_width() for bar in bars] == [16, 16] and [bar.get_x() for bar in bars] == [8, 8]
    assert "node 0 33%, node 3 67%" in _title(figure)
    figure = drawn(FIGURES["memory_by_role"](df))
    bar = artists(figure)["8k default|momentum"][0]
    assert bar.get_width() == pytest.approx(3.0)


def test_placement_asked_and_found_are_ring_and_dot(df) -> None:
    figure = drawn(FIGURES["placement"](df))
    name = "llama3_8b 4k cxl_aware: momentum"
    assert list(_artist(figure, f"asked|{name}|3").get_xdata()) == [0.75]
    assert list(_artist(figure, f"found|{name}|3").get_xdata()) == [0.74]
    assert "at most 1 percentage points off" in _title(figure)


def test_predictions_lie_against_the_measured_peak(df) -> None:
    figure = drawn(FIGURES["predicted"](df))
    dots = _artist(figure, "host|cxl_aware")
    assert sorted(dots.get_xdata()) == [8, 8, 16, 16, 32, 32]
    assert sorted(dots.get_ydata()) == pytest.approx([8.8, 8.8, 17.6, 17.6, 35.2, 35.2])
    assert "10.0% at the worst" in _title(figure)


def test_predicted_times_lie_against_the_measured_medians(df) -> None:
    figure = drawn(FIGURES["predicted_times"](df))
    dots = _artist(figure, "iteration|cxl_aware")
    assert (
        sorted(dots.get_ydata()) == pytest.approx(sorted(0.9 * x for x in dots.get_xdata()))
        and len(dots.get_xdata()) == 6
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["iteration", "forward"]
    assert "Predicted time is off by" in _title(figure) and "10.0% at the worst" in _title(figure)


def test_nothing_overlaps_or_is_cut(df) -> None:
    """Titles and legends lie inside the figure, tick labels beside each other."""
    for name, draw in FIGURES.items():
        figure = drawn(draw(df))
        with style.styled():
            FigureCanvasAgg(figure).draw()
        whole = figure.bbox
        inside: list[Artist] = [*figure.texts, *figure.legends, *(axes.title for axes in figure.axes)]
        inside += [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)]
        inside += [label for axes in figure.axes for label in axes.get_yticklabels()]
        for artist in inside:
            box = artist.get_window_extent()
            assert box.width == 0 or (box.x0 >= -1 and box.x1 <= whole.x1 + 1), (name, artist)
            assert box.width == 0 or (box.y0 >= -1 and box.y1 <= whole.y1 + 1), (name, artist)
        for axes in figure.axes:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
            boxes.sort(key=lambda box: box.x0)
            assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes)), name


def test_failures_have_room_where_lengths_are_many(rows) -> None:
    """Nine lengths, several failures at one of them: the words stay in the band, beside each other."""
    for place, tokens in enumerate(1024 * 2**k for k in range(9)):
        rows.add(tokens=tokens, policy="default", status="oom_host" if place > 6 else "ok")
        rows.add(tokens=tokens, policy="striped", status="skipped" if place > 6 else "ok")
        rows.add(tokens=tokens, policy="striped", seed=1, status="interrupted" if place > 5 else "ok")
    figure = drawn(FIGURES["throughput"](load(rows.folder)))
    with style.styled():
        FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.x0)
    assert len(boxes) == 3
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))
    assert all(box.y0 >= axes.bbox.y0 - 1 for box in boxes)


def test_labels_of_many_keys_are_wrapped_and_their_marks_differ(rows) -> None:
    """Seven variants of one policy that differ in many keys, and another policy."""

    def varied(number: int, config: Config) -> None:
        config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-4 * number, 0.01 * number
        config.optimizer.gradient_clipping, config.train.micro_batch_size = 0.1 * number, number
        config.train.gradient_accumulation_steps, config.memory.huge_pages = number, bool(number % 2)

    for number in range(1, 8):
        for policy in ("default", "striped")[: 1 + (number == 1)]:
            found = [role("momentum", 0, 1.0, 1.0, 1.0)]
            rows.add(tokens=1024, policy=policy, config=partial(varied, number), roles=found)
    table = load(rows.folder)
    for name in ("throughput", "placement"):
        figure = drawn(FIGURES[name](table))
        with style.styled(), warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib's, of a layout that found no room
            FigureCanvasAgg(figure).draw()
        whole = figure.bbox
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        texts += [label for axes in figure.axes for label in axes.get_yticklabels()]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert boxes and all(whole.x0 <= box.x0 and box.x1 <= whole.x1 for box in boxes), name
        if name == "throughput":
            looks = [
                (h.get_color(), h.get_marker()) for h in figure.legends[0].legend_handles[:-1] if isinstance(h, Line2D)
            ]
            assert len(set(looks)) == len(looks) == 8


def test_the_same_rows_give_the_same_files(df, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    some = df[df.model.eq("llama3_8b") & df.seq_len_tokens.gt(4096)]
    first, missing = write_all(some, tmp_path / "a", groups=["numa"])
    assert not missing and len(first) == 2 * len(FIGURES)
    again = style.save(drawn(FIGURES["throughput"](some)), tmp_path / "b", "throughput")
    for path in again:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name
    assert dict(mpl.rcParams) == before  # the caller's settings are left alone


def test_a_policy_looks_the_same_in_every_figure_and_unlike_the_others() -> None:
    assert style.POLICIES.keys() == set(options("numa"))
    looks = list(style.POLICIES.values())
    assert len(set(looks)) == len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    assert style.policy_style("cxl_aware budget=4")[0] == style.POLICIES["cxl_aware"][0]
    assert style.policy_style("of_my_own") == style.policy_style("of_my_own")


def test_without_policies_the_first_group_that_differs_is_compared(rows) -> None:
    for size in (1, 2):
        rows.add(config=lambda config, size=size: setattr(config.train, "micro_batch_size", size))
    df = load(rows.folder)
    assert groups_to_compare(df) == ["train"]
    assert isinstance(speedup(df), Figure)
