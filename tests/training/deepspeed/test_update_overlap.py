"""The update beside the next forward pass gives what an update within the step gives: losses, and every bit of the state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldft.config import to_dict
from tests import rank_processes
from tests.conftest import compose, long

CASES = Path(__file__).with_name("overlap_cases.py")
# The learning rate changes in every iteration, and gradients are clipped in most.
NANO = ("model=nano", "data=repeat", "seq_len.tokens=8", "train.iterations=5", "train.warmup_iterations=1",
        "checkpointing=gpu", "optimizer.learning_rate=2e-3", "launch.device=cpu", "train.precision=bf16",
        "optimizer.schedule=cosine", "optimizer.schedule_warmup=2", "optimizer.gradient_clipping=0.6")  # fmt: skip
# Nothing stays on the device, so that only fetches of the next forward pass wait; and several sub-groups.
FETCHED = "offload.deepspeed={zero_optimization:{stage3_param_persistence_threshold:0,sub_group_size:400000}}"
FIRST = "offload.deepspeed={zero_optimization:{stage3_param_persistence_threshold:0}}"
ACCUMULATION = "train.gradient_accumulation_steps=2"
SHAPES = {
    "bf16, sub-groups": [FETCHED],
    "persistent parameters": [],
    "accumulation, tied embeddings": [FETCHED, ACCUMULATION, "model.tie_word_embeddings=true"],
    "fp32": [FETCHED, "train.precision=fp32"],
    "Lion, torch's memory": [FETCHED, "optimizer=lion", "optimizer.learning_rate=2e-4", "memory.pinning=torch"],
}
ORDERS = ("reverse", "random")
EVENTS = {
    "save": [FETCHED],
    "save and load": [FETCHED],
    "read": [FETCHED],
    "set": [FETCHED],
    "export": [FETCHED],
    "overflow": [FETCHED],
    "unused": [FETCHED, ACCUMULATION],
}
# Planted fault -> the shape or event in which it shows.
FAULTS = {
    "no wait": "bf16, sub-groups",
    "scalars read late": "bf16, sub-groups",
    "factor left out": "bf16, sub-groups",
    "no end before backward": "unused",
    "no end before saving": "save",
    "no end before reading state": "read",
    "started on overflow": "overflow",
}
DELAY_S = 0.004


def config_json(*overrides: str) -> str:
    config = compose(*NANO, *overrides)
    config.validate()
    return json.dumps(to_dict(config))


def run_cases(
    cases: dict[str, dict[str, Any]], folder: Path, ranks: int = 1, device: str = "cpu"
) -> list[dict[str, Any]]:
    """What each rank says of each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    rank_processes.start_and_wait(CASES, [str(folder / "cases.json"), str(folder)], folder, ranks=ranks, device=device)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def without(said: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in both ways."""
    return {key: value for key, value in said.items() if key != "beside"}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = {}
    for shape, overrides in SHAPES.items():
        config = config_json(*overrides)
        cases[f"{shape}: within"] = {"config": config, "overlap": False}
        cases[f"{shape}: native"] = {"config": config, "overlap": True}
        for order in ORDERS:
            cases[f"{shape}: {order}"] = {"config": config, "overlap": True, "order": order, "delay_s": DELAY_S}
    for event, overrides in EVENTS.items():
        case = {"config": config_json(*overrides), "event": event}
        cases[f"{event}: within"] = case | {"overlap": False}
        cases[f"{event}: random"] = case | {"overlap": True, "order": "random", "delay_s": DELAY_S}
    for fault, like in FAULTS.items():
        cases[f"{fault}: planted"] = cases[f"{like}: within"] | {
            "overlap": True,
            "order": "reverse",
            "delay_s": DELAY_S,
            "fault": fault,
        }
    return run_cases(cases, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("order", ["native", *ORDERS])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_state_are_the_same_bit_for_bit(one_rank: dict[str, Any], shape: str, order: str) -> None:
    within, beside = one_rank[f"{shape}: within"], one_rank[f"{shape}: {order}"]
    assert without(beside) == without(within)
    assert beside["beside"] and not within["beside"], "the last update is still to be ended"
    assert within["loss"][-1] < within["loss"][0] and len({*within["learning_rate"]}) > 3
    assert sum(norm > 0.6 for norm in within["norm"]) >= 3, "clipping must be active"


@pytest.mark.parametrize("event", EVENTS)
def test_whatever_looks_in_between_sees_the_updated_state(one_rank: dict[str, Any], event: str) -> None:
    within, beside = one_rank[f"{event}: within"], one_rank[f"{event}: random"]
    assert without(beside) == without(within)
    assert within["skipped"] == (event == "overflow")
    if event == "overflow":
        assert within["hash"] != one_rank["read: within"]["hash"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(one_rank: dict[str, Any], fault: str) -> None:
    """Else the comparisons above could not fail."""
    within, planted = one_rank[f"{FAULTS[fault]}: within"], one_rank[f"{fault}: planted"]
    assert without(planted) != without(within)


def test_a_share_of_other_sub_groups_changes_no_bit(tmp_path: Path) -> None:
    """All of a GPU's share but the GPU (tests/gpu/test_update_overlap.py has that)."""
    cases: dict[str, dict[str, Any]] = {}
    for name, overrides in {"bf16": (), "accumulation": (ACCUMULATION,), "torch": ("memory.pinning=torch",)}.items():
        case = {"config": config_json(FIRST, *overrides), "overlap": True}
        cases |= {f"{name}: none": case, f"{name}: share": case | {"share": 500_000}}
    cases["fault"] = cases["bf16: share"] | {"fault": "norm by other sub-groups"}
    said = run_cases(cases, tmp_path)[0]
    for case in said.values():
        case["hash"].pop("step")  # one for each sub-group
    for name in ("bf16", "accumulation", "torch"):
        assert said[f"{name}: share"] == said[f"{name}: none"]
    assert said["fault"] != said["bf16: none"]


@long
def test_on_two_ranks(tmp_path: Path) -> None:
    config = config_json("launch.num_ranks=2")
    slow = {"config": config, "overlap": True, "order": "forward", "delay_s": DELAY_S}
    cases = {
        "within": {"config": config, "overlap": False},
        "native": {"config": config, "overlap": True},
        "slow": slow,
        "no wait": slow | {"fault": "no wait"},
        # (On one rank without a GPU, a parameter that stays on the device is a view of host memory.)
        "persistent": slow | {"fault": "persistent parameters not waited for"},
    }
    for said in run_cases(cases, tmp_path, ranks=2):
        assert without(said["native"]) == without(said["slow"]) == without(said["within"])
        assert said["within"]["loss"][-1] < said["within"]["loss"][0]
        for fault in ("no wait", "persistent"):
            assert without(said[fault]) != without(said["within"]), fault
