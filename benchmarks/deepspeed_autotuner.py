"""A planner as peer: what DeepSpeed's autotuner finds for a cell, how fast that is, and how long the search takes.

    python benchmarks/deepspeed_autotuner.py OUT.parquet "model=llama3_1b seq_len=8k" "model=llama3_3b seq_len=32k"

Each cell is a command line of ldft, from which the model, the length, the micro-batch, the precision and the optimizer are taken.
The autotuner (`deepspeed --autotuning tune`) starts the script below once for each of its experiments: a plain training script with
torch's AdamW, Liger Kernel and cuDNN's attention on a GPU, and PyTorch's gradient checkpointing, as benchmarks/plain_deepspeed.py.
It tries ZeRO stages 0 to 3 with micro-batches up to the cell's sequences an update; it does not try offload, checkpointing or where
activations lie, which are ldft's choices. One record for each experiment, with `chosen` for its answer; a cell for which no
experiment ran has one record with its last message. `search_s` is the whole search's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import stat
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

TRAIN = "--train"


def train(config_file: Path, settings: str) -> None:
    """One experiment: iterations until DeepSpeed has measured enough and ends this process."""
    import contextlib

    import plain_common
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # isort: split

    import deepspeed

    config = json.loads(config_file.read_text())
    cuda = config["launch"]["device"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    task = plain_common.Setup(config, {}, Path(os.devnull), "sdpa", cuda, "gpu", device)
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    model = plain_common.build(task, task.dtype, task.device)
    plain_common.initialise(model, lambda mine: contextlib.nullcontext())
    plain_common.checkpoint_on_gpu(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["optimizer"]["learning_rate"], fused=cuda)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    shape = (engine.train_micro_batch_size_per_gpu(), config["seq_len"]["tokens"])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cuda else contextlib.nullcontext():
        while True:
            tokens = torch.randint(config["model"]["vocab_size"], shape, device=device)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()


def search(line: str, folder: Path) -> list[dict[str, Any]]:
    """The autotuner's experiments for one cell."""
    from composed import resolved_config

    from ldft.config import to_dict

    config = resolved_config(shlex.split(line))
    train = config.train
    sequences = train.micro_batch_size * train.gradient_accumulation_steps * config.launch.num_ranks
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": train.precision.name == "bf16"},
        "fp16": {"enabled": train.precision.name == "fp16"},
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": "all"},
        "autotuning": {
            "enabled": True,
            "max_train_batch_size": sequences,
            "results_dir": str(folder / "results"),
            "exps_dir": str(folder / "experiments"),
        },
    }
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    # The autotuner takes two programs from PATH: `deepspeed`, the one of this Python, for each experiment; and afterwards pdsh,
    # to end what an experiment may have left on other hosts. There are none.
    program = _program(folder / "deepspeed", f'exec {shlex.quote(sys.executable)} -m deepspeed.launcher.runner "$@"')
    _program(folder / "pdsh", "exit 0")
    # DeepSpeed 0.19.8 expects a run of MLflow in the environment wherever that package is installed.
    (folder / "mlflow.py").write_text("raise ImportError\n")
    env = os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
    }
    asked = [str(program), "--num_gpus", str(config.launch.num_ranks), "--autotuning", "tune", __file__, TRAIN]
    asked += [str(folder / "config.json"), "--deepspeed_config", str(folder / "deepspeed.json")]
    began = time.perf_counter()
    with (folder / "said.log").open("w") as said:
        done = subprocess.run(asked, env=env, cwd=folder, stdout=said, stderr=subprocess.STDOUT, check=False)
    cell = {"cell": line, "model": config.model.name, "tokens": config.seq_len.tokens, "num_ranks": config.launch.num_ranks,
            "search_s": time.perf_counter() - began, "returncode": done.returncode}  # fmt: skip
    best = _read(folder / "results" / "ds_config_optimal.json")
    found = []
    for folder_of_one in sorted(path.parent for path in (folder / "results").glob("*/ds_config.json")):
        asked_of_one = _read(folder_of_one / "ds_config.json")
        if asked_of_one["autotuning"].get("model_info"):
            continue  # the first experiment only counts parameters
        times = _read(folder_of_one / "metrics.json")
        one = {key: value for key, value in asked_of_one.items() if key != "autotuning"}
        micro_batch, steps = one["train_micro_batch_size_per_gpu"], one.get("gradient_accumulation_steps", 1)
        record = cell | {
            "experiment": folder_of_one.name,
            "stage": one["zero_optimization"]["stage"],
            "micro_batch_size": micro_batch,
            "gradient_accumulation_steps": steps,
            "chosen": one == best,
            "deepspeed_json": json.dumps(one),
            "iteration_s": times.get("latency", float("nan")) / 1e6,  # its timers' means are in microseconds
        }
        tokens = micro_batch * steps * config.launch.num_ranks * config.seq_len.tokens
        record["tokens_per_s"] = tokens / record["iteration_s"]
        record["message"] = "" if times else _last_line(folder_of_one / "stderr.log")
        found.append(record)
    return found or [cell | {"message": _last_line(folder / "said.log")}]


def _program(file: Path, line: str) -> Path:
    """A shell script of one line."""
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return content


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text().splitlines() if line.strip()] if file.exists() else []
    return lines[-1][:500] if lines else ""


def main() -> int:
    if sys.argv[1:2] == [TRAIN] or TRAIN in sys.argv[1:3]:  # DeepSpeed's launcher puts --local_rank first
        given = sys.argv[sys.argv.index(TRAIN) + 1 :]
        train(Path(given[0]), given[given.index("--deepspeed_config") + 1])
        return 0
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("cells", nargs="+")
    arguments = parser.parse_args()
    found = []
    for cell in arguments.cells:
        with tempfile.TemporaryDirectory() as folder:
            found += search(cell, Path(folder))
        table = pd.DataFrame(found)
        for package in ("deepspeed", "torch"):
            table[f"{package}_version"] = metadata.version(package)
        table.to_parquet(arguments.out)  # after every cell: a search that is stopped leaves those before it
        shown = [name for name in ("stage", "micro_batch_size", "tokens_per_s", "chosen", "message") if name in table]
        print(
            f"{cell}: {found[-1]['search_s']:.0f} s\n"
            + table[table["cell"] == cell][shown].round(1).to_string(index=False)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
