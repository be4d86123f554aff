"""The training benchmark is fair and runs: peers have the settings that their names say, and every run leaves its samples."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ldft import environment
from ldft.config import Device
from ldft.environment import PACKAGE_DIR
from ldft.preflight import deepspeed_config, fit
from ldft.preflight.resolved import resolve
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


def test_the_longest_length_is_where_the_estimate_ends(contenders, monkeypatch) -> None:
    import long_sequences

    monkeypatch.setattr(environment, "gpus", lambda: ("NVIDIA H200",))
    monkeypatch.setattr(environment, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(environment, "gpu_memory_gib", lambda: 40.0)
    words = ("model=llama3_1b", "launch.device=cuda", "train.precision=bf16", "memory.capacity_gib=64")
    setting = contenders.Setting(words, "sdpa", False, 60)
    found = long_sequences.longest(setting, "ours-offload")
    assert found % long_sequences.STEP == 0 and found > 65536

    def fits(tokens: int) -> bool:
        more = dataclasses.replace(setting, overrides=(*words, f"seq_len.tokens={tokens}"))
        try:
            fit.examine(resolve(contenders.config_of(contenders.CONTENDERS["ours-offload"], more)))
        except fit.DoesNotFitError:
            return False
        return True

    assert fits(found) and not fits(int(found / 0.95) + 3 * long_sequences.STEP)
    monkeypatch.setattr(environment, "gpu_memory_gib", lambda: 1.0)
    with pytest.raises(SystemExit, match="ours-offload: not even 4096 tokens fit here"):
        long_sequences.longest(setting, "ours-offload")


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
    words = [
        "--contenders",
        "ours-as-plain",
        "seed",
        "plain-same",
        "fsdp2-offload",
        "--note",
        "a test",
        "--timeout",
        "300",
    ]
    words += ["model=nano", "seq_len.tokens=32", "train.iterations=3", "train.warmup_iterations=1"]
    said = run("training.py", out, *words)
    records = {record["contender"]: record for record in pq.read_table(out).to_pylist()}
    assert list(records) == ["ours-as-plain", "seed", "plain-same", "fsdp2-offload"]
    for record in records.values():
        assert record["status"] == "ok" and record["note"] == "a test" and record["kernel"]
        assert len(record["iteration_s"]) == len(record["loss"]) == len(record["step_s"]) == 3
        assert record["peak_host_gib"] > 0.1 and record["init_s"] > 0
        assert record["model_tflop_dense"] == pytest.approx(records["ours-as-plain"]["model_tflop_dense"])
    for peer in ("plain-same", "fsdp2-offload"):
        parts = [records[peer][name] for name in ("forward_s", "backward_s", "step_s")]
        for total, *spent in zip(records[peer]["iteration_s"], *parts, strict=True):
            assert 0.5 * total < sum(spent) <= total
    assert json.loads(records["seed"]["deepspeed_config_json"])["zero_optimization"]["sub_group_size"] == 0
    assert "ours x" in said and said.count(": ok in") == 4


@long
def test_a_peer_shares_sequences_as_ldft_does(tmp_path: Path) -> None:
    out = tmp_path / "shared.parquet"
    words = ["model=nano", "launch.num_ranks=2", "launch.sequence_parallel=2", "train.precision=fp32"]
    said = run("long_sequences.py", out, *words, "--runs", "ours-offload:64", "plain-offload:64")
    ours, peer = pq.read_table(out).to_pylist()
    for record in (ours, peer):
        assert record["status"] == "ok" and record["tokens_per_iteration"] == 64 and record["ranks"] == 2
    assert json.loads(peer["deepspeed_config_json"])["sequence_parallel_size"] == 2
    assert ours["loss"] == pytest.approx(peer["loss"], rel=0.02) and "ours-offload        64 ok" in said


def test_overrides_behind_a_list_are_no_runs(tmp_path: Path) -> None:
    """They would be left out of the runs before them."""
    command = [sys.executable, str(FOLDER / "long_sequences.py"), str(tmp_path / "out"), "--runs", "ours-offload:64"]
    done = subprocess.run([*command, "model=nano"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(": --runs: model=nano: no contender of contenders.py; overrides come before --runs\n")


def test_the_regret_of_a_plan_is_against_neighbours_that_ran_again(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import pandas as pd
    import plans

    def run(setting: str, changed: str, again: int, took: float) -> dict[str, object]:
        row = {"cell": "c", "status": "ok", "setting": setting, "changed": changed, "again": again}
        samples = [9.0, took - 0.1, took, took + 0.1]
        return row | {
            "iteration_s": samples,
            "warmup_iterations": 1,
            "tokens_per_iteration": 8,
            "predicted_iteration_s": 1.8,
        }

    rows = [
        run("plan", "", 0, 2.0),
        run("neighbour", "lucky", 0, 1.0),
        run("neighbour", "a", 0, 1.9),
        run("neighbour", "b", 0, 2.4),
    ]
    (line,) = plans.regret(pd.DataFrame(rows)).to_dict("records")
    assert (line["measured_s"], line["error"], line["tokens_per_s"]) == (2.0, pytest.approx(-0.1), 4.0)
    assert "regret" not in line  # nothing ran again
    rows += [run("plan", "", 1, 2.2), run("neighbour", "a", 1, 1.9), run("neighbour", "b", 1, 2.0)]
    (line,) = plans.regret(pd.DataFrame(rows)).to_dict("records")
    assert (line["neighbours"], line["best_neighbour_s"]) == (3, 1.9)
    assert line["regret"] == pytest.approx(2.1 / 1.9 - 1)


def test_alarms_of_the_gate_are_counted_from_runs_that_differ(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gate_alarms
    import numpy as np

    random = np.random.default_rng(3)

    def cells(between: float) -> list[list[np.ndarray]]:
        return [
            [100 * np.exp(random.normal(0, between) + random.normal(0, 0.02, 8)) for _ in range(8)] for _ in range(4)
        ]

    alike = {runs: gate_alarms.rates(cells(0.0), runs, 0.97, draws=200) for runs in (1, 4)}
    assert all(alarms <= 0.05 and seen > 0.95 for alarms, seen in alike.values())
    # Single runs do not show how much runs differ; several do.
    single, several = (gate_alarms.rates(cells(0.05), runs, 0.97, draws=200) for runs in (1, 4))
    assert single[0] > 0.3 and several[0] < 0.1


def test_exchanges_between_ranks_have_a_line_of_their_own(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import profile_iteration

    def event(name: str, begin_s: float, end_s: float, cat: str = "kernel") -> dict[str, object]:
        return {"ph": "X", "cat": cat, "name": name, "ts": 1e6 * begin_s, "dur": 1e6 * (end_s - begin_s), "args": {}}

    events = [event("gemm", 0, 4), event("ncclDevKernel_SendRecv", 3, 6), event("norm", 8, 10)]
    events.append(event("Memcpy HtoD (Pinned -> Device)", 5, 7, "gpu_memcpy"))
    said = profile_iteration.summary({"traceEvents": events}, windows=1).splitlines()
    assert said[:3] == [
        "the device's work spans 10.000 s",
        "kernels    busy   6.000 s in 2",
        "exchanges  busy   3.000 s in 1",
    ]
    assert "exchanges without a kernel beside them: 2.000 s" in said
    assert said[-1].split() == ["0.000", "0.60", "0.30", "0.20", "0.00"]


def test_a_snapshots_peak_is_told_by_what_allocated_it(monkeypatch) -> None:
    """One block there from the beginning, one freed and its address given again, and one only at the peak."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import snapshot_peak

    def event(action: str, address: int, size: int, *files: str) -> dict[str, object]:
        frames = [{"filename": file, "line": 7, "name": "work"} for file in files]
        return {"action": action, "addr": address, "size": size, "frames": frames}

    def block(address: int, size: int, state: str) -> dict[str, object]:
        return {"address": address, "size": size, "state": state}

    events = [
        event("free_requested", 1, 5),
        event("free_completed", 1, 5),
        event("alloc", 1, 3, "/site/torch/_tensor.py", "/site/ldft/runner/worker.py"),
        event("alloc", 9, 10),
        event("free_requested", 9, 10),
        event("alloc", 9, 1, "/site/deepspeed/engine.py"),
    ]
    ends = [block(1, 3, "active_allocated"), block(2, 7, "active_allocated"), block(9, 1, "active_allocated")]
    history = {"device_traces": [events], "segments": [{"blocks": [*ends, block(8, 70, "inactive")]}]}
    unnamed = "no Python function: torch's autograd"
    assert sorted(snapshot_peak.peak(history)) == [(3, "worker.py:7 work"), (7, snapshot_peak.BEFORE), (10, unnamed)]


# Without clipping, a large eps lets AdamW see the gradients' scale.
@pytest.mark.parametrize(("ranks", "clipping"), [(1, 0.5), pytest.param(2, 0, marks=long)])
def test_fsdp2_trains_as_plain_torch_does(contenders, monkeypatch, tmp_path: Path, ranks: int, clipping: float) -> None:
    """The same losses as a loop without FSDP2 that sees every rank's tokens, with accumulation."""
    words = [
        "model=nano",
        "seq_len.tokens=32",
        "launch.device=cpu",
        f"launch.num_ranks={ranks}",
        "train.precision=fp32",
    ]
    words += ["train.iterations=3", "train.gradient_accumulation_steps=2", "optimizer.learning_rate=1e-3"]
    words += [f"optimizer.gradient_clipping={clipping}", "optimizer.eps=1e-3"]
    record = contenders.run("fsdp2-offload", contenders.Setting(tuple(words), "sdpa", False, 120), tmp_path / "run")
    assert record["status"] == "ok", (tmp_path / "run" / "log").read_text()
    assert record["ranks"] == ranks and record["peak_host_gib"] > 0.1 * ranks

    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "",
        "MASTER_PORT": "",
    }.items():
        monkeypatch.setenv(name, value)  # plain_common sets what is missing; undone here
    import plain_common
    import torch

    config, cpu = json.loads(record["config_json"]), torch.device("cpu")
    task = plain_common.Setup(config, {}, tmp_path, "sdpa", False, "none", cpu)
    torch.manual_seed(1)
    model = plain_common.build(task, torch.float32, cpu)
    plain_common.initialise(model, lambda parameters: nullcontext())
    chosen = config["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(), chosen["learning_rate"], chosen["betas"], chosen["eps"], chosen["weight_decay"]
    )
    generators = [torch.Generator().manual_seed(1 + rank) for rank in range(ranks)]
    losses = []
    for _ in range(3):
        shape = (config["train"]["micro_batch_size"], 32)
        batches = [
            [torch.randint(config["model"]["vocab_size"], shape, generator=one) for _ in range(2)] for one in generators
        ]
        for tokens in (tokens for batch in batches for tokens in batch):
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / (2 * ranks)).backward()
            if tokens is batches[0][-1]:
                losses.append(float(loss.detach()))
        if clipping:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clipping) > clipping
        optimizer.step()
        optimizer.zero_grad()
    assert record["loss"] == pytest.approx(losses, rel=1e-5)


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
