"""Tensors of stock DeepSpeed by role: training is the same bit for bit, and every byte lies where its role was placed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldft.config import from_dict, to_dict
from ldft.memory.topology import read_topology
from ldft.preflight import host_estimate
from ldft.preflight.selection import select
from tests import rank_processes
from tests.conftest import IN_CI, Done, compose, deepspeed_has_cpu_lion

CASES = Path(__file__).with_name("role_cases.py")
NODE = read_topology().memory_nodes[0]
NANO = ("model=nano", "data=repeat", "seq_len.tokens=8", "train.iterations=4", "train.warmup_iterations=1",
        "checkpointing=gpu", "optimizer.learning_rate=2e-3", "launch.device=cpu")  # fmt: skip
PARAMETERS = 1_122_624
SUB_GROUPS = "offload.deepspeed={zero_optimization:{sub_group_size:400000}}"
# Every role alone, with every kind that one node allows; the weighted kind by stripes.
PLACED = [
    "numa.scope=roles",
    f"numa.roles.master_weights.nodes=[{NODE}]",
    f"numa.roles.master_gradients.kind=preferred numa.roles.master_gradients.nodes=[{NODE}]",
    f"numa.roles.momentum.kind=interleave numa.roles.momentum.nodes=[{NODE}]",
    f"numa.roles.variance.nodes=[{NODE}] numa.roles.variance.weights=[3]",
    f"numa.roles.compute_weights.nodes=[{NODE}]",
]
ALL_SHAPES = {
    "full": [],
    "full, sub-groups, accumulation": [SUB_GROUPS, "train.gradient_accumulation_steps=2"],
    "full, fp32": ["train.precision=fp32"],
    "full, LoRA": ["lora=r8"],
    "full, Lion": ["optimizer=lion"],
    "optimizer, stage 3": ["offload=optimizer", "offload.stage=3"],
    "optimizer, stage 2": ["offload=optimizer"],
    "optimizer, stage 2, accumulation": ["offload=optimizer", "train.gradient_accumulation_steps=2"],
    "optimizer, stage 1, fp32": ["offload=optimizer", "offload.stage=1", "train.precision=fp32"],
}
# What other shapes cover in part, and stage 1, which few use.
ONLY_IN_CI = ("optimizer, stage 3", "optimizer, stage 1, fp32")
SHAPES = {name: overrides for name, overrides in ALL_SHAPES.items() if IN_CI or name not in ONLY_IN_CI}
STOCK = ("memory.pinning=torch", "optimizer.fused_step=false")
# Arenas with DeepSpeed's own update, too: one shape of each of its two optimizer classes.
DEEPSPEEDS = "exact, DeepSpeed's update"
UPDATED_BY_DEEPSPEED = ("full, sub-groups, accumulation", "optimizer, stage 2")
ON_TWO_RANKS = ("full, sub-groups, accumulation", "optimizer, stage 2, accumulation")


def config_json(*overrides: str) -> str:
    """The resolved config; overrides may hold several, by spaces."""
    config = compose(*NANO, *(word for text in overrides for word in text.split(" ")))
    config.validate()
    return json.dumps(to_dict(config))


def run_cases(
    cases: dict[str, dict[str, Any]], folder: Path, ranks: int = 1, device: str = "cpu"
) -> list[dict[str, Any]]:
    """What each rank says of each case."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [str(folder / "cases.json"), str(folder)]
    said = rank_processes.start_and_wait(CASES, words, folder, ranks=ranks, device=device)
    assert "before `optimizer.step()`" not in said, "torch's schedule has not seen the update"
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def in_one_pass(shape: str) -> bool:
    """Whether the update is ldft's pass over 16-bit gradients (or those of the compute precision)."""
    return "stage 2" not in shape and "stage 1" not in shape


def stock_trains(shape: str) -> bool:
    """Whether DeepSpeed's own optimizer runs here. Its CPULion takes a minute to compile."""
    return "Lion" not in shape or (IN_CI and deepspeed_has_cpu_lion())


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every shape with stock DeepSpeed, with exact arenas, and with every role placed alone."""
    cases = {}
    for name, overrides in SHAPES.items():
        if request.param == 2 and name not in ON_TWO_RANKS:
            continue
        ranks = f"launch.num_ranks={request.param}"
        cases[f"{name}: exact"] = {"config": config_json(*overrides, ranks)}
        cases[f"{name}: placed"] = {"config": config_json(*overrides, ranks, *PLACED, "memory.pinning=none")}
        if stock_trains(name):
            cases[f"{name}: stock"] = {"config": config_json(*overrides, ranks, *STOCK)}
        if name in UPDATED_BY_DEEPSPEED:
            cases[f"{name}: {DEEPSPEEDS}"] = {"config": config_json(*overrides, ranks, "optimizer.fused_step=false")}
    return run_cases(cases, tmp_path_factory.mktemp("trained"), request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_are_those_of_stock_deepspeed_bit_for_bit(trained: list[dict[str, Any]], shape: str) -> None:
    if len(trained) == 2 and shape not in ON_TWO_RANKS:
        pytest.skip("trained on one rank")
    for said in trained:
        exact = said[f"{shape}: exact"]
        assert exact["loss"][-1] < 0.99 * exact["loss"][0], "the loss must fall, else a missing update would not show"
        assert said[f"{shape}: placed"]["loss"] == exact["loss"]
        assert (exact["zero"] == "FusedStage3") == in_one_pass(shape)
        assert exact["state_before"] > 0
        if in_one_pass(shape):  # no overflow, then three of each kind
            assert exact["overflows"] == [[kind > 0] * 2 for kind in range(4) for _ in range(3)]
        if not stock_trains(shape):
            pytest.skip("no CPULion, or not in CI: ldft's runs compared with each other only")
        assert said[f"{shape}: stock"]["loss"] == exact["loss"]
        if shape in UPDATED_BY_DEEPSPEED:
            assert said[f"{shape}: {DEEPSPEEDS}"]["loss"] == exact["loss"]
        assert said[f"{shape}: stock"]["zero"].startswith("DeepSpeedZeroOptimizer")
        assert said[f"{shape}: stock"]["state_before"] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_of_every_role_is_in_its_arena(trained: list[dict[str, Any]], shape: str) -> None:
    if len(trained) == 2 and shape not in ON_TWO_RANKS:
        pytest.skip("trained on one rank")
    ranks = len(trained)
    for rank, said in enumerate(trained):
        for mode in ("exact", "placed"):
            case = said[f"{shape}: {mode}"]
            assert "error" not in case and all(case["held"].values()), case
            found = {role["role"]: role for role in case["roles"]}
            sizes = {name: role["bytes"] for name, role in found.items()}
            # Exactly as computed.
            config = from_dict(json.loads(config_json(*SHAPES[shape], f"launch.num_ranks={ranks}")))
            expected, measured = host_estimate.host_bytes(select(config)), dict(sizes)
            if ranks == 2 and "stage 2, accumulation" in shape:
                # The estimate lets each rank accumulate every gradient; it does so for the parameters that it updates.
                assert measured.pop("compute_gradients") <= expected.pop("compute_gradients")
            assert measured == expected
            if shape == "full":
                assert sum(sizes.values()) == 16 * PARAMETERS
            # Nothing but rounding to cache lines and pages on top.
            for role, size in sizes.items():
                slots = 64 * (4 if "sub-groups" in shape else 40)
                assert size <= case["arena_bytes"][role] <= size + slots, (role, rank)
                assert sum(found[role]["pages"].values()) * 4096 <= size + slots + 4096
                assert set(found[role]["pages"]) == {str(NODE)} or len(read_topology().nodes) > 1
            # Under ZeRO-3 DeepSpeed allocates in the arenas itself.
            assert (case["moved_at_start"] == 0) == in_one_pass(shape)
            assert not case["patched_afterwards"]
        if stock_trains(shape):
            stock = {role["role"]: role["bytes"] for role in said[f"{shape}: stock"]["roles"]}
            assert {role: stock[role] for role in sizes} == sizes
            assert ("master_gradients" in sizes) == (not in_one_pass(shape)) and "master_gradients" in stock


def test_faults_are_found_by_name_and_loading_a_checkpoint_is_mended(tmp_path: Path) -> None:
    moved = ("compute_weights", "master_weights", "momentum", "variance", "compute_gradients")
    cases: dict[str, dict[str, Any]] = {
        role: {"config": config_json("train.iterations=2"), "fault": f"move {role}"} for role in moved
    }
    cases["master_gradients"] = {
        "config": config_json("train.iterations=2", "optimizer.fused_step=false"),
        "fault": "move master_gradients",
    }
    cases["overlap"] = {"config": config_json("train.iterations=2", SUB_GROUPS), "fault": "overlap"}
    for stage in ("3", "2"):
        shape = ["offload=optimizer"] if stage == "2" else []
        cases[f"stock {stage}"] = {"config": config_json(*shape, *STOCK), "fault": "load"}
        cases[f"load {stage}"] = {"config": config_json(*shape), "fault": "load"}
    for hide in (False, True):
        cases[f"hide {hide}"] = {"config": config_json(SUB_GROUPS), "hide": hide}
    said = run_cases(cases, tmp_path / "faults")[0]
    # Where the methods have other names, tensors are moved afterwards, and the log says so.
    hidden, direct = said["hide True"], said["hide False"]
    assert direct["moved_at_start"] == 0 < hidden["moved_at_start"] == 12 * PARAMETERS
    assert all(hidden["held"].values()) and hidden["loss"] == direct["loss"]
    log = (tmp_path / "faults" / "log-0").read_text()
    assert (direct["zero"], hidden["zero"]) == ("FusedStage3", "DeepSpeedZeroOptimizer_Stage3")
    assert log.count("unscale_and_clip_grads_renamed, ") == 1 and "the update makes three passes" in log
    assert log.count("_create_fp32_partitions_renamed: its allocations are moved into their arena afterwards") == 1
    names = {
        "compute_weights": "param_groups_fp16_flat_cpu_memory[0]",
        "master_weights": "fp32_partitioned_groups_flat[0]",
        "master_gradients": "fp32_partitioned_groups_flat[0].grad",
        "momentum": "fp32_partitioned_groups_flat[0].exp_avg",
        "variance": "fp32_partitioned_groups_flat[0].exp_avg_sq",
        "compute_gradients": "grad_partitions_flat_buffer",
    }
    for role, name in names.items():
        assert said[role]["error"].startswith(f"AuditError: {name} ({role}, "), said[role]
    assert "shares memory with fp32_partitioned_groups_flat" in said["overlap"]["error"]
    for stage in ("3", "2"):
        load = said[f"load {stage}"]
        assert "exp_avg (momentum" in load["after_load"] and load["moved"] == 8 * PARAMETERS
        assert "error" not in load and all(load["held"].values())
        assert load["loss"] == said[f"stock {stage}"]["loss"]
        # Back in their old slots: the arenas have not grown.
        assert load["arena_bytes"]["momentum"] < 4 * PARAMETERS + 4096


def test_a_run_with_a_tensor_outside_its_arena_fails_with_its_name(ldft: Callable[..., Done]) -> None:
    folders = [str(Path(__file__).with_name("moved")), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = ldft(env={"PYTHONPATH": os.pathsep.join(folders)})
    row = done.row
    assert (done.exit_code, row.status, row.error_type) == (1, "error", "AuditError"), done.stdout + done.stderr
    assert row.error_message.startswith(
        "fp32_partitioned_groups_flat[0].exp_avg (momentum, 4.3 MiB) is not in the arena"
    )
    assert row.error_message in done.stdout and "internal error" not in done.stdout + done.stderr
