"""`python -m ldft.results log`: what TensorBoard, MLflow and W&B hold of a row, read back by each one's own reader."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldft.config import Config, results
from ldft.results import __main__ as command
from ldft.results import store
from ldft.results.schema import MEASURED, ROW_FILE
from multirun_analysis import load, trackers
from multirun_analysis.trackers import record
from tests.analysis.conftest import START, Rows, settings
from tests.analysis.tracked import LOSS, ODD, TIMES, Log, mlflow_runs, of_its_own
from tests.conftest import long

REAL = Path(__file__).resolve().parents[2] / "multirun_analysis" / "data"


def tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            one = Record()
            one.ParseFromString(parts)
            parts = b""
            yield one


def test_every_list_of_numbers_is_a_series_or_one_per_rank() -> None:
    """A new column cannot be forgotten."""
    lists = {
        one.name
        for one in MEASURED
        if pa.types.is_list(one.type)
        and not pa.types.is_string(one.type.value_type)
        and not pa.types.is_struct(one.type.value_type)
    }
    assert lists == {*record.SERIES, *record.PER_RANK}


def test_every_tracker_is_a_key_and_an_option() -> None:
    assert set(results.TRACKERS) == set(trackers.TRACKERS) == set(command._TARGETS)


def test_record_has_all_of_the_row(full_row: Path) -> None:
    (one,) = trackers.records(full_row)
    assert (one.name, one.status, one.attempt) == ("llama3_8b 1k weighted_0_3", "ok", 1)
    assert one.config["model.name"] == "llama3_8b" and one.config["numa.nodes"] == "[0, 3]"
    assert one.config["train.learning_rate" if "train.learning_rate" in one.config else "optimizer.learning_rate"]
    assert set(one.config) == {name.removeprefix("cfg.") for name in load(full_row).columns if name.startswith("cfg.")}
    assert one.series["iteration_s"] == [9.0, 9.0, *TIMES[2:]] and one.series["skipped_updates"][3] == 1
    assert one.metrics["iteration_median_s"] == 1.25 and one.metrics["step_median_s"] == 0.125
    assert one.metrics["peak_vram_allocated_gib"] == 12.0
    assert one.metrics["memory/node0_gib"] == 1.5 and one.metrics["memory/node3_gib"] == 4.0
    assert one.metrics["roles/momentum/node0_gib"] == 1.0 and one.metrics["roles/momentum/node3_gib"] == 3.0
    assert one.tags["notes"] == f"first; {ODD}" and one.tags["versions.torch"] == "2.11"
    assert one.tags["fused_step"] == "true" and one.tags["attempt"] == "1" and "error_message" not in one.tags
    started = START + timedelta(minutes=1)
    assert (one.started_at, one.ended_at) == (started, started + timedelta(seconds=100))
    assert one.times[0] == started + timedelta(seconds=30 + 9) and one.times[-1] == one.times[0] + timedelta(
        seconds=12.75
    )
    assert set(one.figures) >= {"phases", "memory_by_node", "memory_by_role", "placement", "memory_over_time"}
    assert {path.name for path in one.files} == {"row.parquet", "trace.parquet"}


def test_tensorboard_shows_it(full_row: Path, tmp_path: Path) -> None:
    done = of_its_own(str(full_row), "--tensorboard", str(tmp_path / "tb"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (folder,) = (tmp_path / "tb").iterdir()
    assert folder.name.startswith("llama3_8b_1k_weighted_0_3-") and str(folder) in done.stdout
    events = tensorboard(folder)
    read = events.Scalars("iterations/iteration_s")
    assert [one.value for one in read] == [9.0, 9.0, *TIMES[2:]] and [one.step for one in read] == [0, 1, 2, 3, 4]
    assert read[0].wall_time == (START + timedelta(minutes=1, seconds=39)).timestamp()
    assert events.Scalars("memory/node3_gib")[0].value == 4.0
    assert "figures/memory_over_time" in events.Tags()["images"]
    text = events.Tensors("row/text_summary")[0].tensor_proto.string_val[0].decode()
    assert r"| notes | first; a/b: <c> \| 'd' 👍 |" in text
    # The table of configs, as the HParams tab reads it.
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    config = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    with pytest.raises(KeyError):  # it would hold this run's keys alone, and stand for all runs
        events.SummaryMetadata("_hparams_/experiment")
    assert config["model.name"].string_value == "llama3_8b" and config["status"].string_value == "ok"
    assert config["seq_len.tokens"].number_value == 1024


@pytest.mark.parametrize("store", ["folder", pytest.param("sqlite", marks=long)])
def test_mlflow_shows_it(full_row: Path, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    where = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}" if store == "sqlite" else str(tmp_path / "mlruns")
    for _ in range(2):  # the second replaces the first
        done = log(str(full_row), "--mlflow", where)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    client, runs = mlflow_runs(where, monkeypatch)
    (one,) = runs
    assert (one.info.run_name, one.info.status) == ("llama3_8b 1k weighted_0_3", "FINISHED")
    begin = int((START + timedelta(minutes=1)).timestamp() * 1000)
    assert (one.info.start_time, one.info.end_time) == (begin, begin + 100_000)
    assert one.data.params["numa.nodes"] == "[0, 3]" and one.data.metrics["iteration_median_s"] == 1.25
    assert one.data.tags["ldft.notes"] == f"first; {ODD}" and one.data.tags["ldft.status"] == "ok"
    history = client.get_metric_history(one.info.run_id, "loss")
    assert [repr(point.value) for point in sorted(history, key=lambda p: p.step)] == [repr(value) for value in LOSS]
    figures = {Path(found.path).name for found in client.list_artifacts(one.info.run_id, "figures")}
    assert {"memory_over_time.png", "memory_over_time.svg"} <= figures
    assert {"row.parquet", "trace.parquet"} <= {found.path for found in client.list_artifacts(one.info.run_id)}
    if store == "sqlite":
        assert one.info.artifact_uri.startswith((tmp_path / "new" / "mlartifacts").as_uri())


def test_names_tell_cells_apart(rows: Rows) -> None:
    def left_to_ldft(built: Config) -> None:
        chosen["config"](built)
        built.asked = {"train.precision": "auto"}

    rows.add(**settings("model=nano", "offload=none", "checkpointing=gpu", "optimizer.learning_rate=1e-3"))
    chosen = settings("model=nano", "numa=bind_0", "train.iterations=9")
    rows.add(**{**chosen, "config": left_to_ldft})
    names = [one.name for one in trackers.records(rows.folder, draw=False)]
    first = "nano 1k default offload=none checkpointing=gpu optimizer.learning_rate=0.001 train.precision=bf16"
    assert names == [first, "nano 1k bind_0"]


@long
def test_wandb_gets_it(full_row: Path, tmp_path: Path) -> None:
    done = of_its_own(str(full_row), "--wandb", "mine", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    records = list(wandb_records(tmp_path))
    (begun,) = [one.run for one in records if one.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert (begun.project, begun.display_name, list(begun.tags)) == ("mine", "llama3_8b 1k weighted_0_3", ["ok"])
    assert config["model.name"] == "llama3_8b" and config["row.notes"] == f"first; {ODD}"
    history: list[dict[str, Any]] = []
    for one in records:
        if one.HasField("history"):
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in one.history.item})
    assert [point["iteration_s"] for point in history if "iteration_s" in point][:5] == [9.0, 9.0, *TIMES[2:]]
    summary: dict[str, Any] = {}
    for one in records:
        if one.HasField("summary"):
            summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in one.summary.update}
    assert summary["iteration_median_s"] == 1.25 and summary["memory/node3_gib"] == 4.0 and summary["status"] == "ok"
    files = {path.name for path in tmp_path.glob("wandb/offline-run-*/files/*")}
    assert {"row.parquet", "trace.parquet"} <= files
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/figures/memory_over_time_*.png"))


@long
def test_failed_rows_are_failed_runs(rows: Rows, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.add(status="oom_device", error_type="OutOfMemoryError", duration_s=5.0)
    rows.add(status="interrupted", seed=1, iteration_s=None)
    rows.add(status="invalid", seed=2, duration_s=None)
    where = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = log(str(rows.folder), "--mlflow", where, "--tensorboard", str(tmp_path / "tb"))
    assert done.returncode == 0, done.stderr
    _, runs = mlflow_runs(where, monkeypatch)
    status = {one.data.tags["ldft.status"]: one.info.status for one in runs}
    assert status == {"oom_device": "FAILED", "interrupted": "KILLED", "invalid": "FAILED"}
    assert all(one.data.tags["ldft.error_message"].startswith("made to be ") for one in runs)
    assert len(list((tmp_path / "tb").iterdir())) == 3


def test_committed_rows_are_logged_and_old_ones_read(tmp_path: Path) -> None:
    """Rows as runs left them, one by one: no name depends on the other rows."""
    all_of_them = list(trackers.records(REAL, draw=False))
    assert len(all_of_them) == len(load(REAL)) and all(one.series["loss"] for one in all_of_them if one.status == "ok")
    table = store.read_table(REAL)
    for number, merged in enumerate(all_of_them[:3]):
        path = tmp_path / merged.run_id / "attempt-1" / ROW_FILE
        path.parent.mkdir(parents=True)
        pq.write_table(table.slice(number, 1), path)
        (alone,) = trackers.records(tmp_path / merged.run_id, draw=False)
        assert alone.files == [path] and dataclasses.replace(alone, files=merged.files) == merged
