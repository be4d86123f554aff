"""What Python and DeepSpeed need for one decoder layer, beside the device's work: for predicting the time of an iteration.

Short sequences end there: while the host still starts the kernels of a layer, the device waits. Measured by real runs of a deep and
narrow model, whose kernels take almost no time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ldft.config import Precision
from ldft.errors import LdftError

_LAYERS = 32
_MODEL = (
    *("model=nano", f"model.num_layers={_LAYERS}", "model.hidden_size=256", "model.intermediate_size=512"),
    *("model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=64", "seq_len.tokens=128"),
    *("lora=none", "optimizer=adamw", "attention=auto", "data=random", "plan=none", "machine=this", "numa=default"),
    *("launch.device=cuda", "launch.num_ranks=1", "train.iterations=14", "train.warmup_iterations=4"),
)
# Parameters on the host, fetched layer by layer, or all in device memory.
_RUNS = {
    "fetched": ("offload=full", "offload.gpu_share=0"),
    "resident": ("offload=none",),
}


def seconds(precision: Precision) -> dict[str, list[float]]:
    """Seconds of one layer's forward pass, backward pass, recomputation, and forward pass if it is recomputed later; `fetched` and
    `resident`. Raises LdftError if a run fails.
    """
    found = {}
    for name, overrides in _RUNS.items():
        line = [*_MODEL, f"train.precision={precision.name}", *overrides]
        forward, backward = _run([*line, "checkpointing=none"])
        checkpointed, both = _run([*line, "checkpointing=gpu"])
        found[name] = [forward, backward, max(0.0, both - backward), checkpointed]
    return found


def _run(overrides: list[str]) -> tuple[float, float]:
    """Seconds of forward and backward pass for each layer: medians of a run's iterations."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ldft", *overrides, f"results.dir={folder}"]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        rows = sorted(Path(folder).glob("*/*/row.parquet"))
        row: dict[str, Any] = pq.read_table(rows[-1]).to_pylist()[0] if rows else {}
    if done.returncode or row.get("status") != "ok":
        raise LdftError("the run that measures the host's time for a layer failed; its output is above")
    warm = row["warmup_iterations"]
    forward, backward = (statistics.median(row[part][warm:]) / _LAYERS for part in ("forward_s", "backward_s"))
    return forward, backward
