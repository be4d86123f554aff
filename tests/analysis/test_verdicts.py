"""Widths and verdicts at their edges, baselines by default, and the small labels of rows."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from multirun_analysis import cells, compare, diff, load, pareto, phases
from multirun_analysis.comparison import default_baseline, speed_ratio, verdict
from multirun_analysis.rows import option_name, versions_of
from multirun_analysis.tidy import larger_is_better


def test_an_interval_that_touches_one_finds_no_difference() -> None:
    def said(low: float, high: float) -> str:
        return verdict({"low": low, "high": high})

    assert said(1.0, 1.2) == said(0.8, 1.0) == said(1.0, 1.0) == "no difference found"
    assert said(1.001, 1.2) == "faster" and said(0.8, 0.999) == "slower"
    assert said(math.nan, math.nan) == "no confidence"


def test_the_width_from_runs_is_students() -> None:
    """Against scipy's t-test of the runs' log medians, two runs against three."""
    few, more = [1.0, 1.3], [1.0, 1.1, 0.7]
    ratio = speed_ratio([np.full(3, speed) for speed in few], [np.full(3, speed) for speed in more])
    interval = stats.ttest_ind(np.log(few), np.log(more)).confidence_interval(0.95)
    assert ratio["basis"] == "runs"
    assert (math.log(ratio["low"]), math.log(ratio["high"])) == pytest.approx((interval.low, interval.high))
    assert ratio["speedup"] == pytest.approx(math.sqrt(1.3) / (1.1 * 0.7) ** (1 / 3))


def test_the_wider_of_both_widths_counts() -> None:
    noise = np.exp([-0.3, 0.0, 0.3])
    one = speed_ratio([noise], [noise])
    assert one["basis"] == "iterations"
    # Two runs that agree: the noise of their iterations remains, that of a mean of two.
    two = speed_ratio([noise, noise], [noise, noise])
    error = math.sqrt(math.pi / 2 * 0.09 / 3 / 2 * 2)
    assert two["basis"] == "iterations" and math.log(two["high"]) == pytest.approx(stats.t.ppf(0.975, 8) * error)
    # A run of one sample has no noise of its own; runs have.
    assert speed_ratio([noise[:1], noise[:1]], [noise[:1], noise[1:2]])["basis"] == "runs"


def test_without_noise_or_without_samples() -> None:
    same = speed_ratio([np.full(2, 2.0)], [np.full(2, 1.0)])
    assert (same["low"], same["speedup"], same["high"], same["basis"]) == (2.0, 2.0, 2.0, "iterations")
    for runs, base in (([], [np.ones(3)]), ([np.ones(3)], [np.empty(0)])):
        none = speed_ratio(runs, base)
        assert none["basis"] == "none" and all(math.isnan(none[name]) for name in ("speedup", "low", "high"))
    # A run without samples is no run.
    assert speed_ratio([np.ones(2), np.empty(0)], [np.ones(2)])["basis"] == "iterations"


def test_the_baseline_by_default(rows) -> None:
    rows.add(policy="striped", seed=1)
    rows.add(policy="striped", seed=2)
    rows.add(policy="cxl_aware")
    rows.add(policy="bind_0", status="timeout")
    assert default_baseline(load(rows.folder), "numa") == "striped"  # a failed one is none
    rows.add(policy="default")
    assert default_baseline(load(rows.folder), "numa") == "default"
    rows.add(policy="local_only")
    assert default_baseline(load(rows.folder), "numa") == "local_only"
    # Of as many rows each, the first by name.
    rows.add(policy="local_only", seed=5, config=lambda config: setattr(config.train, "micro_batch_size", 3))
    assert default_baseline(load(rows.folder), "train.micro_batch_size") == "1"


def test_where_all_failed_the_baseline_has_most_rows(rows) -> None:
    for seed, policy in enumerate(("b", "a", "c", "c")):
        rows.add(policy=policy, status="timeout", seed=seed)
    assert default_baseline(load(rows.folder), "numa") == "c"
    assert default_baseline(load(rows.folder)[:2], "numa") == "a"


def test_other_keys_are_compared_within_one_policy(rows) -> None:
    for policy in ("default", "striped"):
        for size in (1, 2):
            rows.add(
                policy=policy, config=lambda config, size=size: setattr(config.train, "micro_batch_size", size),
                tokens_per_iteration=1024 * size, iteration_s=[1.0 if policy == "default" else 0.5] * 3,
            )  # fmt: skip
    table = compare(load(rows.folder), by="train.micro_batch_size", baseline="1")
    assert table[["policy", "option"]].values.tolist() == [["default", "2"], ["striped", "2"]]
    assert table.speedup.tolist() == pytest.approx([2.0, 2.0])


def test_a_failed_side_is_named_with_its_last_failure(rows) -> None:
    rows.add(policy="default", seed=1)
    rows.add(policy="striped", seed=1, status="timeout")
    rows.add(policy="striped", seed=2, status="oom_device")
    line = compare(load(rows.folder)).iloc[0]
    assert (line.verdict, line.runs, line.baseline_runs) == ("OOM, baseline ok", 0, 1)


def test_diff_has_the_figures_of_both_sides(new_rows) -> None:
    a, b = new_rows("a"), new_rows("b")
    for seed, seconds in enumerate((1.0, 2.0, 4.0)):
        a.add(seed=seed, iteration_s=[seconds] * 3, peak_host_gib=seconds)
        b.add(seed=seed, iteration_s=[seconds / 2] * 3, peak_host_gib=7.0, peak_vram_allocated_gib=[3.0, 5.0])
    b.add(seed=9, status="timeout")
    line = diff(load(a.folder), load(b.folder)).iloc[0]
    assert (line.tokens_per_s_a, line.tokens_per_s_b) == (512.0, 1024.0) and line.speedup == pytest.approx(2.0)
    assert (line.peak_host_gib_a, line.peak_host_gib_b, line.peak_vram_gib_b) == (4.0, 7.0, 5.0)
    assert (line.status_a, line.status_b, line.change) == ("ok", "ok", "no difference found")


def test_machines_versions_and_options_are_named(rows) -> None:
    rows.add(git_dirty=True, system="box")
    rows.add(seed=1, git_commit=None)
    rows.add(seed=2, device_type="cuda", gpus=[], system="")
    rows.add(seed=3, device_type="cpu", gpus=["a GPU"], peak_vram_allocated_gib=[0.0])
    rows.add(seed=4, device_type="cuda", gpus=["a GPU"], system="box", peak_vram_allocated_gib=[0.0, 0.5])
    df = load(rows.folder)
    assert df.machine.tolist() == ["box (a CPU)", "a CPU", "a CPU", "a CPU", "box (1 x a GPU)"]
    assert versions_of(df) == ["0123456789ab+", "unknown", "0123456789ab"]
    assert pd.isna(df.peak_vram_gib[3]) and df.peak_vram_gib[4] == 0.5
    assert option_name("numa", "cxl_aware") == "cxl_aware"
    assert option_name("checkpointing", "gpu every=2") == "checkpointing=gpu every=2"
    assert option_name("train", "micro_batch_size=4") == "micro_batch_size=4"


def test_cells_and_phases_leave_out_what_has_no_length(rows) -> None:
    rows.add(tokens=0, status="invalid")
    rows.add(tokens=1, iteration_s=[2.0, 4.0, 4.0])
    table = cells(load(rows.folder))
    assert table.seq_len_tokens.tolist() == [1] and table.other_s[0] == pytest.approx(0.0)
    assert phases(load(rows.folder)).set_index("phase").share["backward"] == pytest.approx(0.6)


def test_cells_come_in_the_order_of_tables(rows) -> None:
    for tokens, policy in ((4096, "default"), (1024, "striped"), (1024, "default")):
        rows.add(tokens=tokens, policy=policy)
    table = cells(load(rows.folder))
    assert table[["seq_len_tokens", "policy"]].values.tolist() == [
        [1024, "default"],
        [1024, "striped"],
        [4096, "default"],
    ]


def test_the_front_compares_all_cells_where_no_group_is_named() -> None:
    table = pd.DataFrame({"s": [1.0, 2.0, 2.0, 3.0], "gib": [3.0, 2.0, 2.0, 2.0], "name": list("abcd")})
    assert pareto(table, "s", "gib", within=()).name.tolist() == ["a", "b", "c"], "of equal cells, all stay"
    assert [larger_is_better(name) for name in ("tokens_per_s", "mfu", "seq_len_tokens", "speedup")] == [True] * 4
    assert not larger_is_better("iteration_s") and not larger_is_better("peak_host_gib")


def test_rows_are_numbered_in_the_order_of_their_start_and_then_of_their_attempt(rows) -> None:
    """Of two that started at once, the folder of the tenth attempt comes before that of the second."""
    for attempt in (10, 2):
        rows.add(attempt=attempt, started_at=datetime(2026, 1, 1, tzinfo=UTC))
    rows.add(seed=1, started_at=datetime(2025, 1, 1, tzinfo=UTC))
    frame = load(rows.folder)
    assert list(frame["attempt"]) == [1, 2, 10] and list(frame.index) == [0, 1, 2]
