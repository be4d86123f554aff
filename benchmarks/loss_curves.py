"""The same training with every attention implementation, with and without Liger Kernel: the distance between the loss curves.

    python benchmarks/loss_curves.py --out loss_curves.parquet              # llama3_1b, 4096 tokens, 20 updates, on one GPU

Same weights and tokens for all, everything in GPU memory. `repeat` trains on one batch, whose loss falls, so that a wrong update
would show; `random` sees fresh tokens. The first variant is the reference.

The learning rate is a tenth of the usual one. At 1e-4, `repeat` memorises its batch within ten updates, and the curves exceed the
allowed 1e-2: in results/loss_curves-llama3_1b-4k-1e-4-h200.parquet they differ by up to 1.9e-2 where the loss is below 0.21, and by
up to 5.3e-3 where it is above 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hydra import compose, initialize_config_dir

from ldft import environment
from ldft.cli import composition
from ldft.config import AttentionKind, Config, Device, from_dict
from ldft.errors import ConfigError
from ldft.preflight import attention, liger
from ldft.preflight.selection import select
from ldft.runner import checks
from ldft.training import data, liger_kernels, model
from ldft.training.checkpointing import checkpointing
from ldft.training.deepspeed import engine

ALLOWED = 1e-2


def config_of(overrides: list[str]) -> Config:
    """The typed config of a command line, for the GPU."""
    composition.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(environment.CONF_DIR)):
        config = from_dict(compose("config", overrides=overrides))
    config.launch.device = Device.cuda
    checks.resolve(config)  # train.precision=auto
    return config


def variants(base: list[str]) -> list[list[str]]:
    """Overrides of each variant that runs here, the reference, torch's SDPA without Liger, first."""
    found = []
    for kind in (AttentionKind.sdpa, *(k for k in AttentionKind if k not in (AttentionKind.auto, AttentionKind.sdpa))):
        for used in ("false", "true"):
            overrides = [f"attention={kind.name}", f"kernels.liger={used}"]
            try:
                config = config_of([*base, *overrides])
                attention.choose(config)
                liger.wanted(config)
            except ConfigError as refused:
                print(f"left out: {' '.join(overrides)}: {refused}")
                continue
            found.append(overrides)
    return found


def train(overrides: list[str]) -> dict[str, Any]:
    """Losses of one variant."""
    begin = time.perf_counter()
    config, device = config_of(overrides), torch.device("cuda", 0)
    run = select(config)
    network = model.build(run, device)
    held = checkpointing.install(config, network, device)
    built = engine.build(run, network, None)
    losses = []
    for iteration in range(config.train.iterations):
        tokens = data.batch(config, iteration, 0, 0).to(device)
        loss = built(input_ids=tokens, labels=tokens).loss
        built.backward(loss)
        built.step()
        losses.append(loss.detach())
    result = {
        "attention": network.config._attn_implementation,
        "liger_modules": liger_kernels.count_modules(network),
        "data": config.data.kind.name,
        "loss": torch.stack(losses).float().tolist(),
        "seconds": time.perf_counter() - begin,
    }
    built.destroy()
    del built, network, held, loss
    gc.collect()
    torch.cuda.empty_cache()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["repeat", "random"])
    parser.add_argument("--out", type=Path, default=Path("loss_curves.parquet"))
    parser.add_argument("overrides", nargs="*", help="further overrides of the config")
    arguments = parser.parse_args()
    base = [
        "model=llama3_1b",
        "seq_len=4k",
        "offload=none",
        "checkpointing=gpu",
        "train.iterations=20",
        "optimizer.learning_rate=1e-5",
        *arguments.overrides,
    ]

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    folder = tempfile.mkdtemp()
    deepspeed.init_distributed(
        "nccl", auto_mpi_discovery=False, init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    rows, worst = [], 0.0
    for kind in arguments.data:
        reference: list[float] = []
        print(f"data={kind}\n{'attention':<20}{'liger':>6}{'first':>9}{'last':>9}{'furthest off':>14}{'s':>7}")
        for overrides in variants([*base, f"data={kind}"]):
            row = train([*base, f"data={kind}", *overrides])
            reference = reference or row["loss"]
            apart = max(abs(a - b) / b for a, b in zip(row["loss"], reference, strict=True))
            worst = max(worst, apart)
            rows.append(row | {"furthest_relative": apart})
            print(
                f"{row['attention']:<20}{row['liger_modules']:>6}{row['loss'][0]:>9.4f}{row['loss'][-1]:>9.4f}{apart:>14.1e}"
                f"{row['seconds']:>7.1f}",
                flush=True,
            )
    about = {"environment_json": json.dumps(environment.describe(), default=str), "overrides": base}
    pq.write_table(pa.Table.from_pylist([row | about for row in rows]), arguments.out)
    print(
        f"furthest off: {worst:.1e} of the reference's loss, allowed {ALLOWED:.0e}; {len(rows)} curves: {arguments.out}"
    )
    torch.distributed.destroy_process_group()
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    raise SystemExit(main())
