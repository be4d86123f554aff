"""Runs that do not fit are refused before a rank is started; in a sweep that is a row, and the sweep goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldft import environment
from ldft.config import Config
from ldft.memory.limits import Free
from ldft.memory.topology import Node, Topology
from ldft.preflight import assumed_machine, fit, selection
from ldft.preflight.resolved import resolve
from ldft.runner import dry_run, parent
from tests.conftest import compose

GIB = 2**30
TWO = Topology(
    nodes=tuple(Node(id=id, cpus=(id,), total_bytes=64 * GIB, distances={id: 10}) for id in (0, 1)),
    gpus={},
    weights={},
    weights_auto=None,
    allowed=(0, 1),
)

# What would otherwise move bytes to the GPU until host memory suffices.
FIXED = ("offload.gpu_share=0", "checkpointing.device_inputs=1")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """64 GiB of host memory on two nodes, of which the second has 2 GiB left; GPUs of 80 GiB."""
    monkeypatch.setattr(selection, "read_topology", lambda: TWO)
    monkeypatch.setattr(assumed_machine, "read_topology", lambda: TWO)
    monkeypatch.setattr(fit, "free_on_node", lambda node: [60 * GIB, 2 * GIB][node])
    monkeypatch.setattr(fit, "free_memory", lambda capacity: Free(bytes=capacity or 62 * GIB, limit="MemAvailable"))
    monkeypatch.setattr(environment, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(environment, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(environment, "gpu_memory_gib", lambda: 80.0)
    return monkeypatch


def refused(config: Config) -> str:
    with pytest.raises(fit.DoesNotFitError) as caught:
        fit.check(resolve(config))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def test_host_memory_in_total(machine) -> None:
    line = refused(compose("model=llama3_8b", "launch.device=cuda", *FIXED))
    assert line.startswith("force: false, and not enough host memory: 121.4 GiB expected, 62.0 GiB free by MemAv")
    assert "master_weights 29.9, momentum 29.9, variance 29.9" in line and "memory.capacity_gib" in line
    fit.check(resolve(compose("model=llama3_8b", "launch.device=cuda", "memory.capacity_gib=160")))
    fit.check(resolve(compose("model=llama3_8b", "launch.device=cuda", "force=true")))
    fit.check(resolve(compose("model=llama3_1b", "launch.device=cuda")))


def test_device_memory(machine) -> None:
    line = refused(compose("model=llama3_8b", "launch.device=cuda", "offload=none"))
    assert "not enough VRAM" in line and "80.0 GiB on the smallest GPU" in line and "use offload=full" in line
    assert "(largest: optimizer 89.7, fp32 gradients 29.9, weights 15.0)" in line


def test_a_copy_that_deepspeed_makes_on_the_host_where_vram_is_short_refuses_nothing(machine) -> None:
    line = ("model=qwen2_5_32b", "launch.device=cuda", "offload=optimizer", "seq_len=4k", "memory.capacity_gib=900")
    fit.check(resolve(compose(*line, "lora=r16")))
    fit.check(resolve(compose(*line)))
    assert "not enough VRAM" in refused(compose(*line[1:], "model=llama3_70b", "lora=r16"))


def test_each_node_where_a_placement_leaves_no_choice(machine) -> None:
    line = refused(compose("model=llama3_1b", "launch.device=cuda", "numa.roles.momentum.nodes=[1]"))
    assert "not enough memory of node 1: 4.6 GiB expected, 2.0 GiB free there (largest: momentum 4.6)" in line
    weights = ("numa.roles.momentum.nodes=[0,1]", "numa.roles.momentum.weights=[3,1]")
    fit.check(resolve(compose("model=llama3_1b", "launch.device=cuda", *weights)))
    refused(compose("model=llama3_1b", "launch.device=cuda", "numa=interleave_all"))
    fit.check(resolve(compose("model=llama3_1b", "launch.device=cuda", "numa.roles.momentum.nodes=[1]", "force=true")))


def test_what_must_be_on_a_node_is_the_sum_over_ranks(machine) -> None:
    line = ("model=llama3_1b", "launch.device=cuda", "launch.num_ranks=2", "offload.gpu_share=0")
    by_role = ("numa.roles.momentum.nodes=[0,1]", "numa.roles.momentum.weights=[3,1]", "numa.roles.variance.nodes=[1]")
    states = 4 * 1_235_814_400
    run = resolve(
        compose(*line, *by_role, "numa.roles.master_weights.nodes=[0]", "numa.roles.master_weights.kind=preferred")
    )
    assert fit.bytes_by_node(run) == {
        0: {"momentum": 0.75 * states},
        1: {"momentum": 0.25 * states, "variance": states},
    }, "preferred leaves a choice"


def test_a_dry_run_says_so(machine) -> None:
    text = dry_run.describe(compose("model=llama3_8b", "launch.device=cpu", "seq_len=32k"))
    assert "\ndoes not fit here: not enough host memory" in text
    text = dry_run.describe(compose("model=llama3_8b", "launch.device=cpu", "seq_len=32k", "force=true"))
    assert "\ndoes not fit here, but force=true runs it anyway: not enough host memory: " in text


def test_a_refusal_is_a_row_with_what_was_predicted_and_starts_nothing(
    machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "driver", lambda: None)
    monkeypatch.setattr(parent, "_run_ranks", lambda *arguments: pytest.fail("a rank was started"))
    row = parent.run(compose("model=llama3_8b", "launch.device=cuda", *FIXED, f"results.dir={tmp_path}")).row
    assert (row["status"], row["error_type"]) == ("invalid", "DoesNotFitError")
    assert row["predicted_host_gib"] == pytest.approx(121.4, abs=0.1) and row["predicted_vram_gib"] > 2
    assert sum(json.loads(row["predicted_host_json"]).values()) == pytest.approx(row["predicted_host_gib"])


def test_a_sweep_goes_on_after_a_cell_that_does_not_fit(ldft) -> None:
    """A model of a terabyte first, since cells of a length keep their order, then one that runs."""
    short = ("-m", "seq_len.tokens=16", "train.iterations=2", "train.warmup_iterations=1")
    done = ldft("model=llama3_70b,nano", base=short)
    assert done.rows["status"].tolist() == ["invalid", "ok"], done.stdout
    refused, ran = done.rows.iloc[0], done.rows.iloc[1]
    assert refused.error_message.startswith("force: false, and not enough host memory")
    assert ran.predicted_host_gib == pytest.approx(ran.peak_host_gib, rel=0.2)


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA is told to show none, where there are some."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for found in (environment._visible, environment._models):
        found.cache_clear()
    yield
    for found in (environment._visible, environment._models):
        found.cache_clear()


@pytest.mark.parametrize(
    ("said", "fits", "part"),
    [
        (
            ["memory.vram_gib=80", "memory.capacity_gib=125", *FIXED],
            False,
            "125.0 GiB free by memory.capacity_gib",
        ),
        (["memory.vram_gib=80", "memory.capacity_gib=125"], True, "so that host memory suffices"),
        (["memory.vram_gib=80", "memory.capacity_gib=1000"], True, "GPUs: 2 of 80.0 GiB"),
        (["memory.vram_gib=8", "memory.capacity_gib=1000", "offload=none"], False, "8.0 GiB by memory.vram_gib"),
        (["memory.capacity_gib=1000"], True, "of unknown size: set e.g. memory.vram_gib=80"),
    ],
)
def test_a_dry_run_answers_for_gpus_that_are_not_here(
    said: list[str], fits: bool, part: str, here, without_gpus: None, tmp_path: Path
) -> None:
    words = ["model=llama3_8b", "launch.device=cuda", "launch.num_ranks=2", "seq_len=32k", *said]
    done = here(*words, "dry_run=true")
    assert done.exit_code == 0, done.stderr
    assert "assumed to be Hopper" in done.stdout and "attention: sdpa_cudnn" in done.stdout
    assert "train.precision=bf16 (auto; no GPU here" in done.stdout and "rank 0:" not in done.stdout
    assert part in done.stdout and ("does not fit" in done.stdout) is not fits
    done = here("-m", *words, "dry_run=true")
    assert done.exit_code == 0 and ("does not fit" in done.stdout) is not fits
    assert not (tmp_path / "results").exists()
    done = here(*words)
    assert done.exit_code == 2 and "no NVIDIA GPU is visible here" in done.stderr


def test_the_command_answers_for_gpus_that_are_not_here(ldft) -> None:
    words = ("model=llama3_8b", "launch.device=cuda", "memory.vram_gib=80", "memory.capacity_gib=1000", "dry_run=true")
    done = ldft(*words, base=(), env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.exit_code == 0 and "GPUs: 1 of 80.0 GiB" in done.stdout, done.stdout + done.stderr
