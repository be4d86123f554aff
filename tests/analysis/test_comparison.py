"""compare and diff: ratios, their confidence, what is matched with what."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ldft.errors import ResultsError
from multirun_analysis import compare, diff, load
from multirun_analysis.comparison import simultaneous, speed_ratio, verdict

TRIALS = 200
# With 200 trials at 95%, more than 20 false alarms come by chance once in 600 times; the seed is fixed besides.
MOST_FALSE = 20


def _trials(difference: float, runs: int, samples: int, between: float = 0.0) -> list[str]:
    """Verdicts over random trials: 1% noise an iteration, `between` more from run to run."""
    random = np.random.default_rng(6)

    def side(speed: float) -> list[np.ndarray]:
        shifts = random.normal(0, between, runs)
        return [speed * np.exp(shift + random.normal(0, 0.01, samples)) for shift in shifts]

    return [verdict(speed_ratio(side(1 + difference), side(1.0))) for _ in range(TRIALS)]


@pytest.mark.parametrize(("runs", "samples"), [(1, 8), (3, 3), (3, 8)])
def test_compare_finds_a_planted_difference_of_3_percent_in_noise_of_1_percent(runs: int, samples: int) -> None:
    found = _trials(0.03, runs, samples)
    assert found.count("faster") >= 0.95 * TRIALS
    assert "slower" not in found


@pytest.mark.parametrize(
    ("runs", "samples", "between"), [(1, 3, 0.0), (1, 8, 0.0), (3, 3, 0.0), (3, 8, 0.0), (3, 8, 0.03), (2, 8, 0.03)]
)
def test_compare_calls_no_difference_none_at_the_stated_confidence(runs: int, samples: int, between: float) -> None:
    found = _trials(0.0, runs, samples, between)
    assert TRIALS - found.count("no difference found") <= MOST_FALSE


def test_the_interval_covers_the_true_ratio_as_often_as_stated() -> None:
    random = np.random.default_rng(7)
    for confidence in (0.8, 0.95):
        covered = 0
        for _ in range(400):
            a, b = (speed * np.exp(random.normal(0, 0.02, 6)) for speed in (1.5, 1.0))
            ratio = speed_ratio([a], [b], confidence)
            covered += ratio["low"] <= 1.5 <= ratio["high"]
        assert covered / 400 >= confidence - 0.03, (confidence, covered)


def test_the_width_for_unequal_noise_is_that_of_welch_and_satterthwaite() -> None:
    """Against scipy's own Welch test: a noisy run and a quiet one have fewer degrees of freedom than their samples."""
    noisy, quiet = np.exp([0.0, 0.2, -0.1, 0.3, -0.4]), np.exp([0.0, 0.01, -0.01, 0.02, -0.02, 0.015, 0.0])
    theirs = stats.ttest_ind(np.log(noisy), np.log(quiet), equal_var=False)
    assert 4 < theirs.df < 4.2  # pooled samples would have 10
    error = np.sqrt(np.pi / 2) * np.sqrt(np.var(np.log(noisy), ddof=1) / 5 + np.var(np.log(quiet), ddof=1) / 7)
    ratio = speed_ratio([noisy], [quiet])
    width = (np.log(ratio["high"]) - np.log(ratio["low"])) / 2
    assert width == pytest.approx(stats.t.ppf(0.975, theirs.df) * error, rel=1e-9)


def test_the_ratio_is_that_of_medians_after_warmup(rows) -> None:
    rows.add(policy="local_only", iteration_s=[2.0, 2.1, 50.0, 2.0, 2.1])
    rows.add(policy="striped", iteration_s=[1.0, 1.0, 1.05, 1.0, 9.0])
    line = compare(load(rows.folder)).iloc[0]
    even = speed_ratio([1 / np.array([1.0, 3.0])], [1 / np.array([1.0, 1.0])])
    assert even["speedup"] == pytest.approx(1 / 2)  # the median time of an even number of samples is their mean
    assert line.baseline == "local_only" and line.option == "striped"
    assert line.speedup == pytest.approx(2.1)  # warm-up samples of 9 s change nothing
    assert line.verdict == "no difference found"  # the outliers widen the interval


def test_only_rows_that_differ_in_nothing_else_are_compared(rows) -> None:
    def gpu(config) -> None:
        config.train.micro_batch_size = 4

    rows.add(policy="default", tokens=1024, iteration_s=[1.0, 1.01, 0.99])
    rows.add(policy="striped", tokens=2048, iteration_s=[1.0, 1.01, 0.99])
    rows.add(policy="striped", tokens=1024, config=gpu, iteration_s=[1.0, 1.01, 0.99])
    assert compare(load(rows.folder), baseline="default").empty
    rows.add(policy="striped", tokens=1024, iteration_s=[0.5, 0.505, 0.495])
    line = compare(load(rows.folder), baseline="default")
    assert line[["option", "seq_len_tokens"]].values.tolist() == [["striped", 1024]]
    assert line.speedup[0] == pytest.approx(2.0) and line.verdict[0] == "faster"


def test_failed_cells_stay_in_the_comparison(rows) -> None:
    rows.add(policy="default", status="oom_host")
    rows.add(policy="striped")
    table = compare(load(rows.folder), baseline="default")
    assert table.verdict.tolist() == ["ok, baseline host OOM"] and table.speedup.isna().all()


def test_repeats_are_runs_of_one_cell_and_run_to_run_noise_counts(rows) -> None:
    for seed, shift in enumerate((0.9, 1.0, 1.1)):
        rows.add(policy="default", seed=seed, iteration_s=[shift, shift * 1.001, shift * 0.999])
        rows.add(policy="striped", seed=seed, iteration_s=[1.05 * shift, 1.05 * shift * 1.001, 1.05 * shift * 0.999])
    line = compare(load(rows.folder), baseline="default").iloc[0]
    assert (line.runs, line.baseline_runs, line.basis) == (3, 3, "runs")
    assert line.verdict == "no difference found"  # iterations alone would have sworn to 5%


def test_one_sample_allows_no_confidence(rows) -> None:
    rows.add(policy="default", iteration_s=[1.0])
    rows.add(policy="striped", iteration_s=[0.5])
    line = compare(load(rows.folder)).iloc[0]
    assert line.speedup == pytest.approx(2.0) and line.verdict == "no confidence"


def test_other_groups_compare_by_what_differs(rows) -> None:
    def batch(size: int):
        return lambda config: setattr(config.train, "micro_batch_size", size)

    rows.add(config=batch(1))
    rows.add(config=batch(4), tokens_per_iteration=4096)
    line = compare(load(rows.folder), by="train.micro_batch_size", baseline="1").iloc[0]
    assert line.option == "4" and line.speedup == pytest.approx(4.0)


def test_seeds_and_counts_are_no_options(rows) -> None:
    for size in (1, 4):
        for seed in (0, 1):
            rows.add(config=lambda config, size=size: setattr(config.train, "micro_batch_size", size), seed=seed)
    table = compare(load(rows.folder), by="train", baseline="micro_batch_size=1")
    assert table[["option", "runs", "baseline_runs"]].values.tolist() == [["micro_batch_size=4", 2, 2]]


def test_an_unknown_baseline_or_group_names_what_there_is(rows) -> None:
    rows.add(policy="default")
    with pytest.raises(ResultsError, match=r"no row has numa=cxl; use one of default"):
        compare(load(rows.folder), baseline="cxl")
    with pytest.raises(ResultsError, match=r"no config group or key 'policy'.*numa"):
        compare(load(rows.folder), by="policy")


def test_diff_names_every_kind_of_change(new_rows) -> None:
    a, b = new_rows("a"), new_rows("b")
    a.add(tokens=1024, iteration_s=[1.0, 1.01, 0.99, 1.0])
    b.add(tokens=1024, iteration_s=[0.8, 0.81, 0.79, 0.8])
    a.add(tokens=2048, iteration_s=[1.0, 1.01, 0.99, 1.0])
    b.add(tokens=2048, iteration_s=[1.0, 1.01, 0.99, 1.0])
    a.add(tokens=4096)
    b.add(tokens=4096, status="timeout")
    a.add(tokens=8192, status="error")
    b.add(tokens=8192, status="error")
    a.add(tokens=512)
    b.add(tokens=256)
    table = diff(load(a.folder), load(b.folder)).set_index("seq_len_tokens")
    assert table.change.to_dict() == {
        256: "only in b",
        512: "only in a",
        1024: "faster",
        2048: "no difference found",
        4096: "ok -> timeout",
        8192: "failed in both",
    }
    assert table.speedup[1024] == pytest.approx(1.25)


@pytest.mark.parametrize(("runs", "between", "below"), [(1, 0.0, 1.0), (3, 0.01, 1.0), (1, 0.01, 0.97)])
def test_a_gate_over_twelve_cells_seldom_refuses_one_where_nothing_changed(
    runs: int, between: float, below: float
) -> None:
    """Of whole diffs, those with a false alarm: iterations vary by 2%, and runs by `between` besides, which single runs do not
    show."""
    random = np.random.default_rng(8)

    def side(speed: float) -> list[np.ndarray]:
        return [speed * np.exp(random.normal(0, between) + random.normal(0, 0.02, 8)) for _ in range(runs)]

    def refused(speed: float) -> int:
        """Of twelve cells."""
        return sum(speed_ratio(side(speed), side(1.0), simultaneous(12))["high"] < below for _ in range(12))

    alarms = sum(bool(refused(1.0)) for _ in range(TRIALS))
    assert alarms <= MOST_FALSE / 2
    assert sum(refused(0.88) for _ in range(10)) >= 110, "what is slower by an eighth is seen in nearly all"
