"""Training through ldft is the training it claims to be: the same losses as a plain loop, as stock DeepSpeed, for any split.

On one repeated batch, whose loss falls: with fresh random tokens it would stay, and an update that is missing would not show.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import rank_processes
from tests.conftest import long

ALONE = Path(__file__).with_name("alone.py")
BASE = (
    "model=nano",
    "data=repeat",
    "seq_len.tokens=96",
    "train.iterations=10",
    "train.warmup_iterations=1",
    "optimizer.learning_rate=2e-3",
)


def relative_error(losses: list[float], reference: list[float]) -> float:
    a, b = np.array(losses), np.array(reference)
    assert len(a) == len(b) == 10
    return float(np.max(np.abs(a - b) / np.abs(b)))


def alone(config_json: str, folder: Path, what: str, ranks: int = 1) -> list[float]:
    """Losses of rank processes started by hand (tests/training/alone.py)."""
    folder.mkdir()
    (folder / "config.json").write_text(config_json)
    with tempfile.TemporaryDirectory() as rendezvous:
        rank_processes.start_and_wait(ALONE, [str(folder), what], folder, ranks=ranks, LDFT_RENDEZVOUS_DIR=rendezvous)
    return json.loads((folder / "rank-0.json").read_text())["loss"]


def plain_pytorch(config_json: str, rule: Any = None, skip: int | None = None) -> list[float]:
    """A plain loop: `rule` (torch's AdamW) in fp32 and torch's clipping; no DeepSpeed engine, nothing offloaded.

    skip: the iteration whose update is left out.
    """
    import torch

    from ldft.config import from_dict
    from ldft.preflight.selection import select
    from ldft.training import data, model

    config = from_dict(json.loads(config_json))
    config.offload.stage = 0
    network = model.build(select(config), torch.device("cpu"))
    rates = config.optimizer
    optimizer = (rule or torch.optim.AdamW)(
        network.parameters(),
        lr=rates.learning_rate,
        betas=(rates.betas[0], rates.betas[1]),
        eps=rates.eps,
        weight_decay=rates.weight_decay,
    )
    losses = []
    for iteration in range(config.train.iterations):
        tokens = data.batch(config, iteration, 0, 0)
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), rates.gradient_clipping)
        if iteration != skip:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory):
    """Row of a run with these overrides."""
    from ldft import results

    def run(*overrides: str):
        folder = tmp_path_factory.mktemp("equality")
        command = [sys.executable, "-m", "ldft", *BASE, f"results.dir={folder}", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return results.read(folder).iloc[0]

    return run


def test_fp32_offloaded_training_equals_a_plain_pytorch_loop(run_once) -> None:
    row = run_once("train.precision=fp32")
    reference = plain_pytorch(row.config_json)
    assert reference[-1] < 0.95 * reference[0], "the loss must fall, else a missing update would not show"
    assert relative_error(row.loss, reference) < 1e-5
    # The comparison can fail: one skipped update of ten is far outside.
    assert relative_error(row.loss, plain_pytorch(row.config_json, skip=3)) > 1e-3


@long
def test_bf16_is_bit_equal_to_stock_deepspeed_called_directly(run_once, tmp_path) -> None:
    row = run_once()
    reference = alone(row.config_json, tmp_path / "stock", "stock")
    assert reference[-1] < 0.95 * reference[0]
    assert list(row.loss) == reference
    assert alone(row.config_json, tmp_path / "fault", "skip_step") != reference


@long
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_with_the_same_total_batch(run_once, tmp_path, ranks: int) -> None:
    one = run_once(f"train.micro_batch_size={ranks}")
    several = run_once("train.micro_batch_size=1", f"launch.num_ranks={ranks}")
    assert one.tokens_per_iteration == several.tokens_per_iteration == 96 * ranks
    assert one.loss[-1] < 0.95 * one.loss[0]
    assert relative_error(several.loss, one.loss) < 5e-4
    # The comparison can fail: each rank keeping its own gradients is far outside.
    apart = alone(several.config_json, tmp_path / "fault", "local_gradients", ranks=ranks)
    assert relative_error(apart, one.loss) > 2e-3
