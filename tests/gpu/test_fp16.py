"""fp16 with loss scaling, everything offloaded: updates are made, and one whose gradients overflow is left out and counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conftest import Done

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
FP16 = ("model=nano", "seq_len.tokens=64", "train.precision=fp16", "offload=full", "checkpointing=cpu", "data=repeat",
        "optimizer.learning_rate=1e-3", "train.iterations=8", "train.warmup_iterations=2", "launch.device=cuda")  # fmt: skip


def test_no_update_is_skipped_after_warm_up(ldft: Callable[..., Done]) -> None:
    row = ldft(base=FP16).row
    assert row.status == "ok", row.error_message
    assert not any(row.skipped_updates[2:]) and len(row.skipped_updates) == 8
    assert row.loss[-1] < 0.95 * row.loss[2]


def test_a_scale_that_overflows_skips_every_update_and_the_row_says_so(ldft: Callable[..., Done]) -> None:
    done = ldft("train.loss_scale=1e12", base=FP16)
    row = done.row
    assert list(row.skipped_updates) == [1] * 8
    assert "ldft: warning: 6 of 6 iterations after warm-up made no update" in done.stdout
    assert min(row.loss) > 0.999 * max(row.loss)
