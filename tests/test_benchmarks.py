"""The training benchmark is fair and runs: peers have the settings that their names say, and every run leaves its samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ldft.config import Device
from ldft.environment import PACKAGE_DIR
from ldft.preflight import deepspeed_config
from ldft.runner.core_binding import physical_cores
from tests.conftest import long

FOLDER = PACKAGE_DIR.parent / "benchmarks"


def run(script: str, out: Path, *words: str) -> str:
    """Run a benchmark on the CPU to its end; returns what it prints."""
    command = [sys.executable, str(FOLDER / script), str(out), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import contenders

    return contenders


def test_peers_differ_from_ours_in_what_their_names_say(contenders) -> None:
    setting = contenders.Setting(("model=nano", "seq_len=2k", "launch.device=cpu"), "sdpa", False, 60)
    for name, contender in contenders.CONTENDERS.items():
        if contender.settings is None:
            continue
        mine = contenders.config_of(contenders.CONTENDERS[contender.against], setting)
        theirs = contenders.config_of(contender, setting)
        # It is updated by DeepSpeed, which ours may be, too; all else is the same.
        assert theirs.optimizer.fused_step is False
        theirs.optimizer.fused_step = mine.optimizer.fused_step
        for section in ("model", "seq_len", "optimizer", "train", "data", "launch"):
            assert getattr(mine, section) == getattr(theirs, section), (name, section)
        mine.launch.device = theirs.launch.device = Device.cuda
        ours, settings = deepspeed_config.build(mine), contender.settings(theirs)
        for key in ("train_batch_size", "gradient_clipping", "bf16", "optimizer"):
            assert ours[key] == settings[key], (name, key)
        offloaded = settings["zero_optimization"]["offload_optimizer"]
        assert offloaded["device"] == ours["zero_optimization"]["offload_optimizer"]["device"]
        assert offloaded.get("pin_memory", True), "a peer pins, by torch's allocator"
        # Defaults are DeepSpeed's own, none are ldft's.
        if name.startswith(("plain-offload", "plain-in-gpu")):
            assert set(settings["zero_optimization"]) == {"stage", "offload_param", "offload_optimizer"}
    seed = contenders.seed(contenders.config_of(contenders.CONTENDERS["seed"], setting))["zero_optimization"]
    assert (seed["sub_group_size"], seed["reduce_bucket_size"], seed["stage3_max_live_parameters"]) == (0, 100_000, 0)


@long
def test_runs_leave_raw_samples(tmp_path: Path) -> None:
    out = tmp_path / "training.parquet"
    words = ["--contenders", "ours-as-plain", "seed", "plain-same", "--note", "a test", "--timeout", "300"]
    words += ["model=nano", "seq_len.tokens=32", "train.iterations=3", "train.warmup_iterations=1"]
    said = run("training.py", out, *words)
    records = {record["contender"]: record for record in pq.read_table(out).to_pylist()}
    assert list(records) == ["ours-as-plain", "seed", "plain-same"]
    for record in records.values():
        assert record["status"] == "ok" and record["note"] == "a test" and record["kernel"]
        assert len(record["iteration_s"]) == len(record["loss"]) == len(record["step_s"]) == 3
        assert record["peak_host_gib"] > 0.1 and record["init_s"] > 0
        assert record["model_tflop_dense"] == pytest.approx(records["ours-as-plain"]["model_tflop_dense"])
    parts = [records["plain-same"][name] for name in ("forward_s", "backward_s", "step_s")]
    for total, *spent in zip(records["plain-same"]["iteration_s"], *parts, strict=True):
        assert 0.5 * total < sum(spent) <= total
    assert json.loads(records["seed"]["deepspeed_config_json"])["zero_optimization"]["sub_group_size"] == 0
    assert "ours x" in said and said.count(": ok in") == 3


@long
def test_scaling_sets_each_number_of_ranks_beside_the_fewest(tmp_path: Path) -> None:
    if len(physical_cores(frozenset(os.sched_getaffinity(0)))) < 2:
        pytest.skip("needs two cores")
    out = tmp_path / "scaling.parquet"
    words = ["--ranks", "1", "2", "--cores", "1", "--timeout", "300"]
    words += ["model=nano", "seq_len.tokens=32", "train.iterations=2", "train.warmup_iterations=1"]
    said = run("scaling.py", out, *words)
    records = pq.read_table(out).to_pylist()
    assert [(record["ranks"], record["cores"], record["status"]) for record in records] == [(1, 1, "ok"), (2, 1, "ok")]
    assert [record["tokens_per_iteration"] for record in records] == [32, 64]
    settings = [json.loads(record["config_json"]) for record in records]
    assert [(one["launch"]["num_ranks"], one["results"]["dir"]) for one in settings] == [(1, "results"), (2, "results")]
    alone, together = (line.split() for line in said.splitlines()[-2:])
    assert (alone[1], alone[6], together[1]) == ("1", "1.000", "2")
    rate = float(together[4]) / 2
    assert float(together[5]) == pytest.approx(rate, abs=1)
    assert float(together[6]) == pytest.approx(rate / float(alone[4]), rel=0.02)


@long
def test_the_benchmark_of_the_trace_runs_with_and_without_it(tmp_path: Path) -> None:
    out = tmp_path / "monitor.parquet"
    words = ["--rounds", "1", "--interval", "0.5"]
    words += ["model=nano", "seq_len.tokens=64", "train.iterations=3", "train.warmup_iterations=1"]
    said = run("monitor.py", out, *words)
    records = pq.read_table(out).to_pylist()
    assert [(record["interval_s"], record["samples"] > 0) for record in records] == [(0.0, False), (0.5, True)]
    assert "tokens/s with samples over without, by round: " in said
