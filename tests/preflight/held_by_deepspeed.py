"""One rank that trains one config after the other and prints the bytes of host memory that DeepSpeed holds, by role.

    python tests/preflight/held_by_deepspeed.py FOLDER    configs: FOLDER/*.json; rank variables as for a worker

A JSON line a config: file name -> role -> bytes. Read from DeepSpeed's own attributes (stage3.py, stage_1_and_2.py), not by ldft.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ldft.config import from_dict
from ldft.preflight.selection import select
from ldft.training import data, model
from ldft.training.deepspeed import operators


def size(*tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def held(optimizer: Any, network: Any) -> dict[str, int]:
    states = [state for state in optimizer.optimizer.state.values() if state]
    moments = {"momentum": "exp_avg", "variance": "exp_avg_sq"}
    found = {role: size(*(state[name] for state in states if name in state)) for role, name in moments.items()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        masters = optimizer.fp32_partitioned_groups_flat
        found["compute_gradients"] = size(optimizer.grad_partitions_flat_buffer)
        frozen = [parameter.ds_tensor for parameter in network.parameters() if not parameter.requires_grad]
        found["compute_weights"] = size(*optimizer.param_groups_fp16_flat_cpu_memory, *frozen)
    else:
        masters = optimizer.single_partition_of_fp32_groups
        found["compute_gradients"] = size(
            optimizer.temp_grad_buffer_for_cpu_offload, *optimizer.accumulated_grads_in_cpu.values()
        )
        found["compute_weights"] = size(*optimizer.param_buffer_of_bit16_for_cpu_offload_groups)
    found["master_weights"] = size(*masters)
    found["master_gradients"] = size(*(master.grad for master in masters))
    return found


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    configs = {file.stem: from_dict(json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))}
    for config in {config.optimizer.name: config for config in configs.values()}.values():
        operators.load(select(config), say=lambda text: None)
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        verbose=False,
    )
    for name, config in configs.items():
        run = select(config)
        network = model.build(run, torch.device("cpu"))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        running, *_ = deepspeed.initialize(model=network, model_parameters=trained, config=run.deepspeed)
        gradients: dict[str, int] = {}
        for step in range(config.train.gradient_accumulation_steps):
            tokens = data.batch(config, 0, step, rank)
            running.backward(running(input_ids=tokens, labels=tokens).loss)
            # ZeRO-3 gives an fp32 gradient back to the optimizer only while it steps; before, it is all there.
            gradients = held(running.optimizer, network)
            running.step()
        found = held(running.optimizer, network) | {"master_gradients": gradients["master_gradients"]}
        if rank == 0:
            print(f"HELD {json.dumps({name: found})}", flush=True)
        running.destroy()


if __name__ == "__main__":
    main()
