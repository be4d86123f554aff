"""Rank process of test_killed_while_saving.py: it trains with the update beside the forward pass, saves, and is killed in the next
save; or it says what such a checkpoint must hold, and what it holds.

    python tests/runner/saved_and_killed.py CONFIG.json FOLDER die|compare

die: saves FOLDER/one after two iterations, trains one more, and starts to save FOLDER/two while that update is still to come: the
save waits for it, and the process gets SIGKILL. compare: prints hashes of the state after two iterations with the update within the
step, and of what the newest checkpoint in FOLDER gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ldft.config import from_dict
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from ldft.training import data, model
from ldft.training.deepspeed import engine as engines
from ldft.training.deepspeed import fused_step, operators, role_memory


def build(config_json: str, overlap: bool) -> tuple[Any, Any]:
    """A config and an engine of it."""
    config = from_dict(json.loads(config_json))
    config.optimizer.overlap_step = overlap
    run = resolve(config)
    arenas = role_memory.arenas_of(run, 0)
    return config, engines.build(run, model.build(run, torch.device("cpu"), arenas), arenas)


def train(config: Any, engine: Any, iterations: range) -> None:
    for iteration in iterations:
        tokens = data.batch(config, iteration, 0, 0)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()


def hash_of(engine: Any) -> str:
    """Of master weights and moments, read through DeepSpeed's public functions."""
    digest = hashlib.sha256()
    for parameter in engine.module.parameters():
        digest.update(deepspeed.utils.safe_get_full_fp32_param(parameter).detach().numpy().tobytes())
        for moment in ("exp_avg", "exp_avg_sq"):
            digest.update(deepspeed.utils.safe_get_full_optimizer_state(parameter, moment).detach().numpy().tobytes())
    return digest.hexdigest()


def die(config_json: str, folder: Path) -> None:
    config, engine = build(config_json, overlap=True)
    train(config, engine, range(2))
    engine.save_checkpoint(str(folder), tag="one")
    updates = fused_step.updates_of(engine)
    assert updates is not None
    updates._threads = 0  # then the update makes no progress before something waits for it
    train(config, engine, range(2, 3))
    print(json.dumps({"bytes_updated": updates._job.progress[2]}), flush=True)
    updates._job = Waiting()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    engine.save_checkpoint(str(folder), tag="two")


class Waiting:
    """Stands in for that update: it is not done before the process ends."""

    def finish(self) -> None:
        time.sleep(60)


def compare(config_json: str, folder: Path) -> None:
    config, engine = build(config_json, overlap=False)
    train(config, engine, range(2))
    hashes = {"within": hash_of(engine)}
    engine.destroy()
    config, engine = build(config_json, overlap=True)
    path, _ = engine.load_checkpoint(str(folder))
    print(json.dumps(hashes | {"loaded": hash_of(engine), "from": Path(path).parent.name}), flush=True)
    engine.destroy()


def main() -> None:
    config_json, folder = Path(sys.argv[1]).read_text(), Path(sys.argv[2])
    operators.load(
        select(from_dict(json.loads(config_json))), say=print
    )  # else DeepSpeed would compile one that nobody needs
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{folder}/store-{os.getpid()}", rank=0, world_size=1
    )
    {"die": die, "compare": compare}[sys.argv[3]](config_json, folder)


if __name__ == "__main__":
    main()
