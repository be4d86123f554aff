"""load and the tidy tables: derived columns, cells, fronts, memory, predictions, odd folders."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ldft.config import Config
from ldft.errors import ResultsError
from ldft.results import schema
from multirun_analysis import (
    cells,
    compare,
    load,
    memory_by_node,
    memory_by_role,
    pareto,
    phases,
    placement,
    predicted,
    predicted_times,
)
from tests.analysis.conftest import node, role


def test_every_derived_column_has_its_value(rows) -> None:
    rows.add(tokens=2048, policy="striped", iteration_s=[1.0, 2.0, 4.0], peak_vram_allocated_gib=[3.0, 5.0])
    rows.add(tokens=4096, status="oom_device", peak_vram_allocated_gib=[])
    df = load(rows.folder)
    ok, failed = df.iloc[0], df.iloc[1]
    assert np.isnan(failed.peak_vram_gib)
    assert (ok.model, ok.policy, ok.seq_len_tokens, ok.machine, ok.ok) == ("tiny", "striped", 2048, "a CPU", True)
    assert ok.sample_tokens_per_s.tolist() == [2048.0, 1024.0, 512.0]
    assert ok.forward_median_s == pytest.approx(0.6) and ok.peak_vram_gib == 5.0
    assert (failed.failure, failed.ok) == ("OOM", False) and len(failed.sample_tokens_per_s) == 0


def test_overridden_options_are_told_apart_by_label(rows) -> None:
    rows.add()
    rows.add(config=lambda config: setattr(config.model, "num_layers", 1))
    rows.add(config=lambda config: setattr(config.train, "micro_batch_size", 4))
    df = load(rows.folder)
    assert df.model.tolist() == ["tiny num_layers=2", "tiny num_layers=1", "tiny num_layers=2"]
    assert df.variant.tolist() == ["micro_batch_size=1", "micro_batch_size=1", "micro_batch_size=4"]


def test_gpu_hours_are_those_of_all_gpus(rows) -> None:
    def two(built: Config) -> None:
        built.launch.num_ranks = 2

    rows.add(iteration_s=[1.0, 1.0, 1.0], tokens=3600, device_type="cuda", config=two)
    rows.add(iteration_s=[1.0, 1.0, 1.0], tokens=3600)
    rows.add(status="oom_device", device_type="cuda", seed=1)
    found = load(rows.folder)["gpu_hours_per_billion_tokens"].tolist()
    assert found[0] == pytest.approx(2 * 1e9 / 3600**2) and np.isnan(found[1:]).all()


def test_a_failure_is_superseded_by_a_later_ok_attempt(rows) -> None:
    rows.add(status="timeout", attempt=1)
    rows.add(status="ok", attempt=2)
    rows.add(tokens=2048, status="ok", attempt=1)
    rows.add(tokens=2048, status="timeout", attempt=2)
    df = load(rows.folder)
    assert df.superseded.tolist() == [True, False, False, False]
    table = cells(df)
    assert table.failure.tolist() == ["", "timeout 1/2"]
    assert table.status.tolist() == ["ok", "ok"] and table.runs.tolist() == [1, 1]


def test_cells_take_medians_over_runs_and_ranges_over_iterations(rows) -> None:
    for seed, time in enumerate((1.0, 2.0, 4.0)):
        rows.add(seed=seed, iteration_s=[time] * 3)
    cell = cells(load(rows.folder)).iloc[0]
    assert (cell.runs, cell.samples, cell.tokens_per_s) == (3, 9, 512.0)
    assert (cell.tokens_per_s_p10, cell.tokens_per_s_p90) == (256.0, 1024.0)
    assert cell.forward_s == pytest.approx(0.6) and cell.step_s == pytest.approx(0.2)


def test_cells_have_the_update_where_rows_do(rows) -> None:
    overlapped = {"update_s": [9.0, 9.0, 0.5, 0.7, 0.6], "update_wait_s": [9.0, 9.0, 0.2, 0.1, 0.3]}
    rows.add(overlap_step=True, **overlapped)
    rows.add(tokens=2048, without=("update_s", "update_wait_s", "overlap_step"))
    table = cells(load(rows.folder))
    assert (table.update_s[0], table.update_wait_s[0], table.overlap_step[0]) == (0.6, 0.2, True)
    assert pd.isna(table.update_s[1]) and not table.overlap_step[1]


def test_phases_have_seconds_and_shares(rows) -> None:
    rows.add(iteration_s=[2.0, 2.0, 2.0])
    rows.add(tokens=2048, status="error")
    table = phases(load(rows.folder))
    assert table.set_index("phase").seconds.round(6).to_dict() == {
        "forward": 0.6,
        "backward": 1.2,
        "step": 0.2,
        "other": 0,
    }
    assert table.share.sum() == pytest.approx(1.0) and len(table) == 4


def test_the_front_keeps_what_nothing_beats(rows) -> None:
    points = {"a": (1.0, 4.0), "b": (2.0, 3.0), "c": (2.0, 5.0), "d": (4.0, 1.0), "e": (5.0, 1.0)}  # seconds, GiB
    for policy, (time, gib) in points.items():
        rows.add(policy=policy, iteration_s=[time] * 3, peak_host_gib=gib)
    rows.add(policy="failed", status="oom_host")
    df = load(rows.folder)
    assert sorted(pareto(df, x="peak_host_gib", y="tokens_per_s").policy) == ["a", "b", "d"]
    assert sorted(pareto(df, x="peak_host_gib", y="iteration_s").policy) == ["a", "b", "d"]
    with pytest.raises(ResultsError, match="no column 'speed' to compare; use one of machine"):
        pareto(df, x="peak_host_gib", y="speed")


@pytest.mark.filterwarnings("error")  # pandas warns before it changes what a list of one key gives
def test_the_fronts_of_groups_come_in_their_order(rows) -> None:
    for tokens in (4096, 1024, 2048):
        rows.add(tokens=tokens, peak_host_gib=1.0)
    table = cells(load(rows.folder)).iloc[::-1]
    front = pareto(table, x="peak_host_gib", y="tokens_per_s", within=("seq_len_tokens",))
    assert front.seq_len_tokens.tolist() == [1024, 2048, 4096]


def test_a_machine_is_named_by_its_gpus_and_their_number(rows) -> None:
    rows.add(device_type="cuda", gpus=["a GPU"])
    rows.add(tokens=2048, device_type="cuda", gpus=["a GPU"] * 2)
    assert load(rows.folder).machine.tolist() == ["1 x a GPU", "2 x a GPU"]


def test_memory_by_node_role_and_placement(rows) -> None:
    entries = [role("momentum", 0, 6, 0.25, 0.5), role("momentum", 3, 6, 0.75, 0.5), role("other", 0, 1, 1.0, None)]
    rows.add(nodes=[node(0, 4.0), node(3, 2.0)], roles=entries)
    df = load(rows.folder)
    assert memory_by_node(df)[["node", "total_gib"]].values.tolist() == [[0, 4.0], [3, 2.0]]
    assert memory_by_role(df)[["role", "node", "gib"]].values.tolist() == [
        ["momentum", 0, 1.5],
        ["momentum", 3, 4.5],
        ["other", 0, 1.0],
    ]
    assert placement(df).difference.tolist() == [-0.25, 0.25]


def test_process_policies_have_shares_asked_and_found(rows) -> None:
    shares = [
        {"host": "h", "node": 0, "added_gib": 3.0, "share": 0.6, "requested_share": 0.5},
        {"host": "h", "node": 3, "added_gib": 2.0, "share": 0.4, "requested_share": 0.5},
    ]
    open_ended = [{"host": "h", "node": 0, "added_gib": 3.0, "share": 1.0, "requested_share": None}]
    rows.add(policy="interleave_0_3", numa_shares=shares)
    rows.add(policy="default", numa_shares=open_ended)
    table = placement(load(rows.folder))
    assert table[["policy", "role", "node"]].values.tolist() == [
        ["interleave_0_3", "process", 0],
        ["interleave_0_3", "process", 3],
    ]
    assert table["rank"].tolist() == [0, 0]
    assert table.difference.tolist() == pytest.approx([0.1, -0.1])
    assert table.bytes.tolist() == [5 * 2**30] * 2  # what was added on all nodes of the host, in bytes as for roles


def test_a_policy_inherited_from_numactl_is_no_default(rows) -> None:
    rows.add(numa_policy="default", iteration_s=[1.0, 1.01, 0.99])
    rows.add(numa_policy="interleave over 0,3", attempt=2, iteration_s=[0.5, 0.51, 0.49])
    df = load(rows.folder)
    assert df.policy.tolist() == ["default", "default: interleave over 0,3"]
    assert len(cells(df)) == 2
    line = compare(df).iloc[0]
    assert line.baseline == "default" and line.speedup == pytest.approx(2.0)


def test_predictions_stand_beside_what_was_measured(rows) -> None:
    rows.add(predicted_host_gib=2.2, peak_host_gib=2.0)
    rows.add(tokens=2048)
    table = predicted(load(rows.folder))
    assert table[["quantity", "predicted_gib", "measured_gib"]].values.tolist() == [["host", 2.2, 2.0]]
    assert table.ratio[0] == pytest.approx(1.1)


def test_predictions_of_both_memories_and_of_all_times_are_numbered_through(rows) -> None:
    """A figure looks the worst one up by its number."""
    rows.add(predicted_host_gib=2.2, peak_host_gib=2.0, predicted_vram_gib=1.0, peak_vram_allocated_gib=[2.0])
    rows.add(seed=1, predicted_host_gib=2.2, peak_host_gib=2.0, predicted_iteration_s=1.0, predicted_forward_s=1.0)
    df = load(rows.folder)
    assert list(predicted(df).index) == [0, 1, 2] and list(predicted_times(df).index) == [0, 1]
    assert predicted(df)["ratio"].tolist() == pytest.approx([1.1, 1.1, 0.5])


def test_predicted_times_stand_beside_the_medians(rows) -> None:
    rows.add(predicted_iteration_s=1.2, iteration_s=[9.0, 1.0, 1.0, 1.0], warmup_iterations=1)
    rows.add(tokens=2048)
    table = predicted_times(load(rows.folder))
    assert table[["quantity", "predicted_s", "measured_s", "ratio"]].values.tolist() == [["iteration", 1.2, 1.0, 1.2]]


def test_rows_without_memory_columns_give_empty_tables(rows) -> None:
    rows.add(without=("nodes",))
    df = load(rows.folder)
    assert memory_by_node(df).empty and memory_by_role(df).empty and placement(df).empty and predicted(df).empty
    assert predicted_times(df.drop(columns=[name for name in df if name.startswith("predicted")])).empty


def test_older_rows_take_todays_default_for_a_key_they_lack(rows) -> None:
    rows.add(tokens=1024, without=("cfg.checkpointing.mode", "kernel"))
    rows.add(tokens=1024, seed=1)
    df = load(rows.folder)
    assert df["cfg.checkpointing.mode"].tolist() == ["cpu", "cpu"]
    assert len(cells(df)) == 1 and cells(df).runs[0] == 2


def test_an_empty_folder_gives_every_column_and_no_row(tmp_path) -> None:
    df = load(tmp_path)
    assert df.empty and {"model", "policy", "variant", "seq_len_tokens", "ok"} <= set(df.columns)
    assert cells(df).empty and pareto(df, "peak_host_gib", "tokens_per_s").empty
    assert set(schema.schema().names) <= set(df.columns)


def test_a_path_that_is_no_folder_is_one_line() -> None:
    with pytest.raises(ResultsError, match="no-such is not a folder; name the results"):
        load("no-such")


def test_labels_are_text_whatever_pandas_does_with_nulls(rows) -> None:
    rows.add(status="invalid", cpu=None, gpus=None)
    df = load(rows.folder)
    assert isinstance(df.machine[0], str) and not pd.isna(df.machine[0])
