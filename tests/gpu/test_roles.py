"""Arenas with a real GPU: pinned where DMA touches them, exact in bytes, and training is stock DeepSpeed's bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.deepspeed.test_roles import NANO, PARAMETERS, config_json, run_cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DMA = ("param_groups_fp16_flat_cpu_memory[0]", "grad_partitions_flat_buffer")
STAGING = "param_buffer_of_bit16_for_cpu_offload_groups[0]"


def test_offloaded_training_on_cuda_equals_stock_in_pinned_arenas_of_exact_size(tmp_path: Path) -> None:
    assert NANO[-1] == "launch.device=cpu"
    shapes = {
        "full": [],
        "accumulation": ["train.gradient_accumulation_steps=2"],
        "stage 2": ["offload=optimizer", "train.gradient_accumulation_steps=2"],
    }
    cases = {}
    for name, overrides in shapes.items():
        for pinning in ("torch", "exact", "none"):
            words = (*overrides, "launch.device=cuda", f"memory.pinning={pinning}")
            cases[f"{name}: {pinning}"] = {"config": config_json(*words)}
    said = run_cases(cases, tmp_path / "cases", device="cuda")[0]
    for name in shapes:
        stock, exact, pageable = (said[f"{name}: {pinning}"] for pinning in ("torch", "exact", "none"))
        assert stock["loss"][-1] < 0.97 * stock["loss"][0]
        assert exact["loss"] == stock["loss"] == pageable["loss"]
        for case in (exact, pageable):
            assert "error" not in case and all(case["held"].values()), case
        assert not any(pageable["pinned"].values()), pageable["pinned"]
        touched = DMA if name != "stage 2" else (STAGING, "single_partition_of_fp32_groups[0].grad")
        assert all(exact["pinned"][tensor] for tensor in touched), exact["pinned"]
        assert not any(pinned for tensor, pinned in exact["pinned"].items() if "exp_avg" in tensor), exact["pinned"]
        sizes = {role["role"]: role["bytes"] for role in exact["roles"]}
        assert sizes == {role["role"]: role["bytes"] for role in stock["roles"]}
        if name != "stage 2":
            assert exact["moved_at_start"] == 0
            # The update reads the gradients in compute precision: there are no others.
            assert sum(sizes.values()) == 16 * PARAMETERS
            assert sum(exact["arena_bytes"].values()) <= 16 * PARAMETERS + 5 * 4096
