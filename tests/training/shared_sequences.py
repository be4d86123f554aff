"""A rank that trains cases one after the other, for test_sequence_parallel.py: shared_sequences.py CASES.json OUT.pt

CASES.json: name -> {"config": resolved config, "uneven": whether only the last tokens of a sequence are trained on,
"fault": planted fault or ""}. OUT.pt, written by rank 0: name -> losses, norms of the gradient, gradients of the first iteration
and weights after the last, in full, by parameter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch

from ldft.config import Config, from_dict
from ldft.preflight import deepspeed_config, mlp_tiles, sequence_parallel
from ldft.preflight.resolved import complete
from ldft.preflight.selection import Selection, select
from ldft.training import data, model, tiled_mlp
from ldft.training.checkpointing import checkpointing
from ldft.training.deepspeed import engine as engines
from ldft.training.deepspeed import fused_step, operators, role_memory

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CPU = torch.device("cpu")


def part_without(fault: str, whole: data.MicroBatch, place: int, parts: int) -> data.MicroBatch:
    """data._part with a fault."""
    found = REAL_PART(whole, place, parts)
    part = found.part
    assert part
    if fault == "positions start at 0 on each rank":
        part = dataclasses.replace(part, positions=part.positions - part.positions[:, :1])
    if fault == "labels shifted within each part":
        shifted = torch.nn.functional.pad(found.labels, (0, 1), value=data.IGNORED)[:, 1:]
        part = dataclasses.replace(part, next_labels=shifted)
    if fault == "each rank's own mean":
        part = dataclasses.replace(part, counted=(part.next_labels != data.IGNORED).sum().float())
    return dataclasses.replace(found, part=part)


REAL_PART = data._part


def mostly_ignored(*words: Any) -> data.MicroBatch:
    """data._whole, with labels for the last third of each sequence only."""
    found = REAL_WHOLE(*words)
    late = torch.arange(found.tokens.shape[1]) >= found.tokens.shape[1] * 2 // 3
    return dataclasses.replace(found, labels=found.tokens.masked_fill(~late, data.IGNORED))


REAL_WHOLE = data._whole


@contextmanager
def planted(fault: str, uneven: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if uneven:
            stack.enter_context(patch.object(data, "_whole", mostly_ignored))
        if fault:
            stack.enter_context(patch.object(sequence_parallel, "check", lambda *_: None))
            stack.enter_context(patch.object(data, "_part", lambda *words: part_without(fault, *words)))
        yield


def selected(config: Config, fault: str) -> Selection:
    settings = deepspeed_config.build(config)
    if fault == "gradients are summed up, not scattered":
        settings["zero_optimization"] |= {"reduce_scatter": False, "contiguous_gradients": True}
    return select(config, deepspeed=settings)


def whole(parameter: Any, state: str) -> torch.Tensor | None:
    """A tensor of the optimizer, of all ranks."""
    if state == "weights":
        return deepspeed.utils.safe_get_full_fp32_param(parameter)
    return deepspeed.utils.safe_get_full_optimizer_state(parameter, state)


def train(config: Config, fault: str) -> dict[str, Any]:
    run = complete(selected(config, fault))
    arenas = role_memory.arenas_of(run, RANK)
    network = model.build(run, CPU, arenas)
    placement = arenas.placement_of("activations") if arenas else None
    checkpointing.install(config, network, CPU, placement, pin=False, device_inputs=run.device_inputs)
    if run.mlp_tiles > 1:
        tiled_mlp.install(network, run.mlp_tiles, skips=mlp_tiles.skips_in_recomputation(config))
    engine = engines.build(run, network, arenas)
    updates = fused_step.updates_of(engine)
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}, "weights": {}}
    for iteration in range(config.train.iterations):
        total = torch.zeros(())
        for step in range(config.train.gradient_accumulation_steps):
            batch = data.micro_batch(config, iteration, step, RANK)
            loss = batch.weighted(engine(**batch.inputs).loss)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        if updates:
            updates.finish()
        torch.distributed.all_reduce(total)
        found["losses"].append(float(total) / RANKS / config.train.gradient_accumulation_steps)
        found["norms"].append(float(engine.get_global_grad_norm()))
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            if iteration == 0:
                momentum = whole(parameter, "exp_avg")
                assert momentum is not None
                found["gradients"][name] = momentum.double() / (1 - config.optimizer.betas[0])
            if iteration == config.train.iterations - 1:
                weights = whole(parameter, "weights")
                assert weights is not None
                found["weights"][name] = weights.double().clone()
    engine.destroy()
    return found


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    store = f"file://{os.environ['LDFT_RENDEZVOUS_DIR']}/store"
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=store, rank=RANK, world_size=RANKS, verbose=False
    )
    found = {}
    for name, case in cases.items():
        config = from_dict(case["config"])
        with planted(case["fault"], case["uneven"]):
            operators.load(select(config), say=print)
            found[name] = train(config, case["fault"])
        print("done", name, flush=True)
    if RANK == 0:
        torch.save(found, sys.argv[2])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
