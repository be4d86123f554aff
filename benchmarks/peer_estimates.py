"""What other tools say before a run about the memory that it will need, against what measured runs needed. Needs no GPU.

    python benchmarks/peer_estimates.py OUT.parquet

For each committed row named in ROWS: the measured peaks, ldft's estimate, `accelerate estimate-memory` for training with Adam
(its functions on the same model, without the hub), and DeepSpeed's estimate_zero3_model_states_mem_needs for the same offload.
Rows of plain DeepSpeed are there for its own formula. accelerate knows no offload and gives one number; DeepSpeed's formula counts
no activations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from accelerate.commands.estimate import estimate_training_usage  # type: ignore[import-untyped]
from accelerate.utils.modeling import calculate_maximum_sizes  # type: ignore[import-untyped]
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

from ldft import environment
from ldft.config import Config, OffloadDevice, from_dict
from ldft.preflight import parameter_counts
from ldft.preflight.selection import select
from ldft.training import model

RESULTS = Path(__file__).parent / "results"
# File and contender.
ROWS = [
    ("share-llama3_8b-32k-h200", None),
    ("long_sequences-plans-h200", None),
    ("long_sequences-131072-llama3_3b-h200", "plain-offload"),
    ("training-llama3_8b-32k-2gpus-h100", "plain-offload"),
    ("share-llama3_3b-8k-h200", "plain-in-gpu"),
]
GIB = 2**30


def measured(name: str, contender: str | None) -> list[dict[str, Any]]:
    """The rows of a file that ended ok, of one contender."""
    rows = pq.read_table(RESULTS / f"{name}.parquet").to_pylist()
    return [row for row in rows if row["status"] == "ok" and row.get("contender") == contender]


def answers(config: Config, in_gpu: bool) -> dict[str, float]:
    """What the peers say, in GiB."""
    # The model alone: nothing sharded or offloaded.
    whole = dataclasses.replace(
        config.offload, stage=0, parameters=OffloadDevice.none, optimizer=OffloadDevice.none, gpu_share=None
    )
    alone = dataclasses.replace(config, offload=whole)
    with environment.assumed(environment.Assumed(config.launch.num_ranks, 139.8)):
        network = model.build(select(alone), torch.device("meta"))
    size, _ = calculate_maximum_sizes(network)
    in_fp32 = size * 4 // parameter_counts.width(config)  # what it takes as the size of a model
    parameters = parameter_counts.num_parameters(config.model)
    offload = {"cpu_offload": not in_gpu, "cpu_offload_params": config.offload.parameters is not OffloadDevice.none}
    host, device, _ = estimate_zero3_model_states_mem_needs(
        parameters, parameter_counts.embedding_parameters(config.model), config.launch.num_ranks, **offload
    )
    return {
        "accelerate_gib": max(estimate_training_usage(in_fp32, "bfloat16").values()) / GIB,
        "deepspeed_host_gib": host / GIB,
        "deepspeed_vram_gib": device / GIB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    found = []
    for name, contender in ROWS:
        for row in measured(name, contender):
            config = from_dict(json.loads(row["config_json"]) | {"asked": {}})
            line = {
                "rows": name,
                "contender": contender or "ldft",
                "model": config.model.name,
                "tokens": config.seq_len.tokens,
                "measured_host_gib": row["peak_host_gib"],
                "measured_vram_gib": max(row["peak_vram_allocated_gib"]),
                "ldft_host_gib": row.get("predicted_host_gib"),
                "ldft_vram_gib": row.get("predicted_vram_gib"),
            }
            found.append(line | answers(config, contender == "plain-in-gpu"))
    table = pd.DataFrame(found)
    for package in ("accelerate", "deepspeed"):
        table[f"{package}_version"] = metadata.version(package)
    table.to_parquet(arguments.out)
    print(table.round(1).to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
