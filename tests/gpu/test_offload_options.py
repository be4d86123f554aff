"""Ways of offload in which DeepSpeed moves tensors itself, on a GPU: each trains, or its row says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import Done

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LDFT = Callable[..., Done]
# A matrix of more than 1 MiB a layer: smaller ones are not swapped.
TINY = ("model=nano", "model.hidden_size=256", "model.intermediate_size=4096", "model.num_attention_heads=4", "model.head_dim=64",
        "data=repeat", "seq_len.tokens=128", "train.iterations=9", "train.warmup_iterations=1",
        "optimizer.learning_rate=1e-3")  # fmt: skip


def run(ldft: LDFT, *overrides: str) -> Done:
    return ldft("launch.device=cuda", "launch.timeout_s=240", *overrides, base=TINY, timeout_s=300)


def last(done: Done) -> pd.Series:
    """The row of the latest of a test's runs."""
    return done.rows.sort_values("started_at").iloc[-1]


def losses(done: Done) -> np.ndarray:
    row = last(done)
    log = done.results_dir / row.log_path
    assert row.status == "ok", f"{row.error_message}\n{log.read_text()[-3000:]}"
    return np.array(list(row.loss))


def test_super_offload_trains_as_full_does(ldft: LDFT) -> None:
    reference = losses(run(ldft, "offload=full", "optimizer.gradient_clipping=0"))
    done = run(ldft, "offload=super_offload", "optimizer.gradient_clipping=0")
    assert np.allclose(losses(done), reference, rtol=2e-2), (losses(done), reference)
    assert reference[-1] < 0.9 * reference[0]
    assert list(last(done).notes) == []


def test_super_offload_with_clipping_says_what_it_loses(ldft: LDFT) -> None:
    done = run(ldft, "offload=super_offload")
    assert losses(done)[-1] < 0.9 * losses(done)[0]
    assert "gradient_clipping=0.9" in done.row.notes[0] and f"ldft: note: {done.row.notes[0]}" in done.stdout


def test_zenflow_trains_and_says_that_it_is_another_algorithm(ldft: LDFT) -> None:
    done = run(ldft, "offload=zenflow")
    assert losses(done)[-1] < losses(done)[0]
    assert "another algorithm" in done.row.notes[0]


def test_nvme_trains_as_full_does_and_leaves_nothing_behind(ldft: LDFT, tmp_path: Path) -> None:
    done = run(ldft, "offload=nvme", f"offload.nvme_path={tmp_path}/disk")
    if done.row.status == "invalid" and "libaio" in done.row.error_message:
        pytest.skip(done.row.error_message)
    reference = losses(run(ldft, "offload=full"))
    rows = done.rows.set_index("cfg.offload.optimizer")
    assert np.allclose(list(rows.loc["nvme"].loss), reference, rtol=1e-2)
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("offload", ["full", "none"])
def test_lion_trains(ldft: LDFT, offload: str) -> None:
    done = run(ldft, "optimizer=lion", "optimizer.learning_rate=2e-4", f"offload={offload}")
    assert losses(done)[-1] < 0.95 * losses(done)[0]
