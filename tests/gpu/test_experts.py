"""A mixture of experts on a GPU: offloaded, its layer inputs on the host, within the estimate of device memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conftest import Done

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# 1e9 parameters, of which the experts of a layer are a third.
MIXTURE = ("model=llama3_1b", "model.family=mixtral", "model.num_layers=3", "model.intermediate_size=4096", "model.num_experts=8",
           "model.num_experts_per_token=2", "model.router_aux_loss=0.01", "train.precision=bf16", "seq_len=8k",
           "train.micro_batch_size=2", "train.iterations=3", "train.warmup_iterations=1", "launch.device=cuda",
           "offload=full")  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "gpu", "none"])
def test_peak_device_memory_is_as_estimated(ldft: Callable[..., Done], mode: str) -> None:
    done = ldft(f"checkpointing={mode}", base=MIXTURE)
    assert done.exit_code == 0, done.stderr
    row = done.row
    assert row.status == "ok" and row.loss[-1] < row.loss[0] + 1
    assert row.predicted_vram_gib == pytest.approx(row.peak_vram_allocated_gib[0], rel=0.15)
    assert row.model_tflop_dense > 0
