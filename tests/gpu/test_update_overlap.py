"""The update beside the next forward pass of a GPU gives what one within the step gives: losses, and every bit of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.deepspeed.test_update_overlap import DELAY_S, FETCHED, FIRST, config_json, run_cases, without

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
FP16 = ("train.precision=fp16", "train.loss_scale=1024")
SHAPES = {
    "bf16, sub-groups": [FETCHED],
    "persistent parameters": [],
    "accumulation, tied embeddings": [
        FETCHED,
        "train.gradient_accumulation_steps=2",
        "model.tie_word_embeddings=true",
    ],
    "fp16": [FETCHED, *FP16],
    "fp32": [FETCHED, "train.precision=fp32"],
    "Lion, torch's memory": [FETCHED, "optimizer=lion", "optimizer.learning_rate=2e-4", "memory.pinning=torch"],
}
SHARES = {
    "share": [FIRST, "offload.gpu_share=0.4"],
    "share, persistent parameters, accumulation": ["offload.gpu_share=0.5", "train.gradient_accumulation_steps=2"],
    "share, fp16, tied embeddings": [FIRST, *FP16, "offload.gpu_share=0.4", "model.tie_word_embeddings=true"],
    "share, Lion, torch's memory": [
        *(FIRST, "optimizer=lion", "optimizer.learning_rate=2e-4", "memory.pinning=torch", "offload.gpu_share=0.4")
    ],
    "share of all": [FIRST, "offload.gpu_share=1"],
    "share, fp32": [FIRST, "train.precision=fp32", "offload.gpu_share=0.4"],
}
EVENTS = ("save", "save and load", "read", "export", "overflow")
FAULTS = {"no wait": "bf16, sub-groups", "persistent parameters not waited for": "persistent parameters"}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = {}
    for shape, overrides in SHAPES.items():
        case = {"config": config_json(*overrides, "launch.device=cuda")}
        cases[f"{shape}: within"] = case | {"overlap": False}
        cases[f"{shape}: native"] = case | {"overlap": True}
        cases[f"{shape}: random"] = case | {"overlap": True, "order": "random", "delay_s": DELAY_S}
    for shape, overrides in SHARES.items():
        without_share = [word for word in overrides if "gpu_share" not in word]
        cases[f"{shape}: within"] = {
            "config": config_json(*without_share, "offload.gpu_share=0", "launch.device=cuda"),
            "overlap": False,
        }
        cases[f"{shape}: native"] = {"config": config_json(*overrides, "launch.device=cuda"), "overlap": True}
    for event in EVENTS:
        config = config_json(*SHARES["share"], *(FP16 if event == "overflow" else ()), "launch.device=cuda")
        cases[f"{event}: share"] = {"config": config, "overlap": True, "event": event}
        words = FP16 if event == "overflow" else ()
        case = {"config": config_json(FETCHED, *words, "launch.device=cuda"), "event": event}
        cases[f"{event}: within"] = case | {"overlap": False}
        cases[f"{event}: random"] = case | {"overlap": True, "order": "random", "delay_s": DELAY_S}
    for fault, like in FAULTS.items():
        late = {"overlap": True, "order": "reverse", "delay_s": DELAY_S, "fault": fault}
        cases[f"{fault}: planted"] = cases[f"{like}: within"] | late
    return run_cases(cases, tmp_path_factory.mktemp("gpu"), device="cuda")[0]


@pytest.mark.parametrize("order", ["native", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_state_are_the_same_bit_for_bit(said: dict[str, Any], shape: str, order: str) -> None:
    within, beside = said[f"{shape}: within"], said[f"{shape}: {order}"]
    assert without(beside) == without(within)
    assert beside["beside"] and not within["beside"], "the last update is still to be ended"
    assert within["loss"][-1] < within["loss"][0]
    assert sum(norm > 0.6 for norm in within["norm"]) >= 3, "clipping must be active"


@pytest.mark.parametrize("event", EVENTS)
def test_whatever_looks_in_between_sees_the_updated_state(said: dict[str, Any], event: str) -> None:
    within, beside = said[f"{event}: within"], said[f"{event}: random"]
    assert without(beside) == without(within)
    assert within["skipped"] == (event == "overflow")


@pytest.mark.parametrize("shape", SHARES)
def test_a_share_updated_on_the_gpu_changes_no_bit(said: dict[str, Any], shape: str) -> None:
    within, shared = said[f"{shape}: within"], said[f"{shape}: native"]
    assert shared["on_device"] > 0 and within["on_device"] == 0
    for case in (within, shared):
        case["hash"].pop("step", None)  # one for each sub-group, of which a share makes others
    assert {**without(shared), "on_device": 0} == without(within)
    assert within["loss"][-1] < within["loss"][0]


@pytest.mark.parametrize("event", EVENTS)
def test_whatever_looks_in_between_sees_the_share_too(said: dict[str, Any], event: str) -> None:
    within, shared = said[f"{event}: within"], said[f"{event}: share"]
    assert shared["on_device"] > 0
    for key in ("loss", "norm", "skipped") + (("event",) if event in ("read", "export") else ()):
        assert shared[key] == within[key], key
    assert {**shared["hash"], "step": 0} == {**within["hash"], "step": 0}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(said: dict[str, Any], fault: str) -> None:
    assert without(said[f"{fault}: planted"]) != without(said[f"{FAULTS[fault]}: within"])
