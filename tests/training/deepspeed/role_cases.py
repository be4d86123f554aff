"""Rank process of test_roles.py: train each of several configs in turn and say what became of losses and roles.

    python tests/training/deepspeed/role_cases.py CASES.json FOLDER

CASES.json: {name: {"config": <config_json>, "fault": one of those below, or "", "hide": whether DeepSpeed's names are others}}.
Writes FOLDER/rank-<r>.json.
Each case goes through the functions that a worker calls, in one process, so that imports are paid once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ldft.config import Device, from_dict
from ldft.errors import LdftError
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from ldft.training import data, model
from ldft.training.deepspeed import arena_hooks, audit, fused_step, layout, operators, rebinding, role_memory, roles
from ldft.training.deepspeed import engine as engines


def clone_of(engine: Any, role: str) -> None:
    """Move the first owner of a role out of its arena."""
    item = next(item for item in roles.tensors(engine) if item.role == role and item.owner)
    item.tensor.data = item.tensor.detach().clone()


def overlap(engine: Any) -> None:
    """Let the variance of the smallest partition lie in the memory of the largest one's: inside the arena, and wrong."""
    found = [item.tensor for item in roles.tensors(engine) if item.role == "variance" and item.owner]
    found.sort(key=torch.Tensor.numel)
    found[0].data = found[-1].detach()[: found[0].numel()]


def save_and_load(engine: Any, arenas: Any, folder: Path) -> dict[str, Any]:
    """DeepSpeed replaces the moments when it loads; bring them back."""
    engine.save_checkpoint(str(folder), tag="one")
    engine.load_checkpoint(str(folder), tag="one")
    said: dict[str, Any] = {}
    try:
        audit.check([*roles.tensors(engine)], arenas)
    except audit.AuditError as error:
        said["after_load"] = str(error)
    said["moved"] = rebinding.replace_after_load(engine, arenas)
    return said


def overflows(engine: Any, rank: int) -> list[tuple[bool, bool]]:
    """Whether gradients overflow, by this optimizer and by DeepSpeed's: none does, then one of the last rank's."""
    optimizer = engine.optimizer
    gradients = optimizer.grad_partitions_flat_buffer
    last, said = rank == torch.distributed.get_world_size() - 1, []
    for value in (1.0, float("inf"), float("-inf"), float("nan")):
        for position in (0, gradients.numel() // 2 + 1, gradients.numel() - 1):
            gradients.uniform_(-1, 1)
            gradients[position] = value if last else 1.0
            # The last parameter of each rank has no norm, as if the last micro-batch had not used it.
            parameters = [parameter for group in optimizer.fp16_groups for parameter in group][:-1]
            views = getattr(optimizer, layout.GRADIENT_VIEWS)
            optimizer.norm_for_param_grads = {
                optimizer.get_param_id(p): optimizer._constant_buffered_norm2(views[p.ds_id]) for p in parameters
            }
            said.append((optimizer.has_overflow(), DeepSpeedZeroOptimizer_Stage3.has_overflow(optimizer)))
    return said


def train(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Losses, and where every role is after the last iteration."""
    config, fault = from_dict(json.loads(case["config"])), case.get("fault", "")
    device = torch.device("cuda", rank) if config.launch.device is Device.cuda else torch.device("cpu")
    run = resolve(config)
    arenas = role_memory.arenas_of(run, rank)
    network = model.build(run, device, arenas)
    engine = engines.build(run, network, arenas)
    said: dict[str, Any] = {"loss": [], "state_before": len(engine.optimizer.state)}
    said["zero"] = type(engine.optimizer).__name__
    said["moved_at_start"] = arenas.moved_bytes if arenas else None
    for iteration in range(config.train.iterations):
        for step in range(config.train.gradient_accumulation_steps):
            tokens = data.batch(config, iteration, step, rank).to(device)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            said["loss"].append(float(loss))
        if iteration == 1 and fault == "load" and arenas is not None:
            said |= save_and_load(engine, arenas, folder / "checkpoint")
        elif iteration == 1 and fault == "load":
            engine.save_checkpoint(str(folder / "stock"), tag="one")
            engine.load_checkpoint(str(folder / "stock"), tag="one")
    if said["zero"] == "FusedStage3" and not fault:
        said["overflows"] = overflows(engine, rank)
    if fault.startswith("move "):
        clone_of(engine, fault.removeprefix("move "))
    elif fault == "overlap":
        overlap(engine)
    if device.type == "cuda":
        said["pinned"] = {item.name: item.tensor.is_pinned() for item in roles.tensors(engine) if item.owner}
    try:
        said["roles"] = [dataclasses.asdict(role) for role in audit.measure([*roles.tensors(engine)], arenas, None)]
        if arenas is not None:
            said["held"] = {item.name: arenas.of(item.role).holds(item.tensor) for item in roles.tensors(engine)}
            said["arena_bytes"] = {a.role: sum(b.numel() for b in a.blocks) for a in arenas.by_role.values()}
    except LdftError as error:
        said["error"] = f"{type(error).__name__}: {error}"
    engine.destroy()
    return said


def main() -> None:
    gc.freeze()  # what is imported stays, as in a worker: DeepSpeed looks for garbage at every start of an engine
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    configs = [from_dict(json.loads(case["config"])) for case in cases.values()]
    device = configs[0].launch.device.name
    if device == "cuda":
        torch.cuda.set_device(rank)
    for config in {config.optimizer.name: config for config in configs}.values():
        operators.load(select(config), say=lambda text: None)
    deepspeed.init_distributed(
        "nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
    )
    said = {}
    methods, needed = dict(arena_hooks.METHODS), fused_step.NEEDED
    untouched = [getattr(DeepSpeedZeroOptimizer_Stage3, method) for method in methods] + [Init._partition_param]
    for name, case in cases.items():
        # As in a release that has other names for them.
        renamed = "_renamed" if case.get("hide") else ""
        arena_hooks.METHODS = {f"{method}{renamed}": methods[method] for method in methods}
        fused_step.NEEDED = tuple(f"{method}{renamed}" for method in needed)
        said[name] = train(case, rank, folder / name)
        now = [getattr(DeepSpeedZeroOptimizer_Stage3, method) for method in methods] + [Init._partition_param]
        said[name]["patched_afterwards"] = now != untouched
        (folder / f"rank-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
