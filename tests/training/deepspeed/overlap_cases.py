"""Rank process of test_update_overlap.py: train several configs in turn, with the update within the step or beside the next forward
pass, and say losses, skipped updates, gradient norms and hashes of all state.

    python tests/training/deepspeed/overlap_cases.py CASES.json FOLDER

CASES.json: {name: {"config": <config_json>, "overlap": bool, "order": forward|reverse|random, "delay_s": of each parameter,
"event": what happens in the third iteration (see `EVENTS`), "share": see `share_on_the_host`, "fault": planted (see `plant`)}}.
Writes FOLDER/rank-<r>.json.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ldft import _native
from ldft.config import Device, from_dict
from ldft.preflight import gpu_share
from ldft.preflight.resolved import resolve
from ldft.preflight.selection import select
from ldft.training import data, model
from ldft.training.deepspeed import arena_hooks, audit, fused_step, operators, rebinding, role_memory, update_overlap
from ldft.training.deepspeed import engine as engines
from ldft.training.optimizers import host_optimizer
from ldft.training.optimizers.host_optimizer import HostAdamW, Task


class SlowUpdate:
    """Like _native.Update, one parameter after the other in a given order, and slow: it sleeps before each."""

    def __init__(self, tasks: list[Task], order: str, delay_s: float) -> None:
        self._tasks, self._delay_s = tasks, delay_s
        self._ready = [threading.Event() for _ in tasks]
        self._running = threading.Event()
        self._running.set()
        self._order = list(range(len(tasks)))
        if order == "reverse":
            self._order.reverse()
        elif order == "random":
            random.Random(1).shuffle(self._order)
        self.progress = (0.0, 0.0, 0, 0)

    def start(self, threads: int, nice: int) -> None:
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        for number in self._order:
            time.sleep(self._delay_s)
            self._running.wait()
            rule, *others = self._tasks[number].arguments
            one = _native.Update(None)
            one.add(rule() if callable(rule) else rule, *others)
            one.start(0, 0)
            one.finish()
            self._ready[number].set()

    def wait(self, number: int) -> None:
        self.resume()
        self._ready[number].wait()

    def finish(self) -> None:
        self.resume()
        self._thread.join()

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()


def plant(fault: str, undo: list[Callable[[], None]]) -> None:
    """Put a fault in place; `undo` takes it back."""

    def replace(owner: Any, name: str, value: Any) -> None:
        before = vars(owner).get(name)
        undo.append(lambda: delattr(owner, name) if before is None else setattr(owner, name, before))
        setattr(owner, name, value)

    updates, fused, stock = update_overlap.Updates, fused_step.FusedStage3, fused_step.FusedStage3.__mro__[1]
    wait, scalars, native = updates.wait, HostAdamW._scalars, HostAdamW._native_rule
    if fault == "no wait":
        replace(updates, "wait", lambda self, parameters: None)
    elif fault == "persistent parameters not waited for":
        replace(updates, "wait", lambda self, parameters: wait(self, [p for p in parameters if not p.ds_persist]))
    elif fault == "scalars read late":
        replace(HostAdamW, "_scalars", lambda self, *of: (lambda: scalars(self, *of),))
        replace(HostAdamW, "_native_rule", staticmethod(lambda later: lambda: native(*later())))
    elif fault == "factor left out":
        replace(HostAdamW, "_scalars", lambda self, factor, *of: scalars(self, 1.0, *of))
    elif fault == "no end before backward":
        replace(fused, "backward_prologue", stock.backward_prologue)
    elif fault == "no end before saving":
        for name in ("checkpoint_event_prologue", "state_dict"):
            replace(fused, name, getattr(stock, name))
    elif fault == "no end before reading state":
        replace(fused, "_get_fp32_opt_state_partition", stock._get_fp32_opt_state_partition)
    elif fault == "norm by other sub-groups":
        replace(fused, "_get_norm_groups", stock._get_norm_groups)
    elif fault == "started on overflow":
        replace(fused, "_loss_scale_update_and_overflow_cleanup", lambda self: False)


def share_on_the_host(elements: int, undo: list[Callable[[], None]]) -> None:
    """Give the first sub-group, of so many elements, the ways of a GPU's share, with host memory in the GPU's place."""

    def replace(owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    hooks, install = arena_hooks.engine, fused_step.install

    def settled(run: Any, _: Any) -> Any:
        zero = run.zero | {"sub_group_size": elements}
        return dataclasses.replace(run, deepspeed=run.deepspeed | {"zero_optimization": zero})

    replace(gpu_share, "settle", settled)
    replace(arena_hooks, "engine", lambda arenas, **named: hooks(arenas, **{**named, "first_on": torch.device("cpu")}))
    replace(fused_step, "install", lambda engine, *, overlap, share: install(engine, overlap=overlap, share=True))
    # What is on a GPU is in no arena.
    replace(rebinding, "settle", lambda *of: None)
    replace(audit, "check", lambda *of: None)


def hash_of(optimizer: Any) -> dict[str, str]:
    """Hashes of masters, of each moment with its step count, and of weights in compute precision."""
    hashes: dict[str, Any] = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        hashes.setdefault(name, hashlib.sha256()).update(tensor.detach().cpu().view(torch.uint8).numpy().tobytes())

    for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        add("masters", master)
        add("weights", optimizer.fp16_partitioned_groups_flat[i])
        for key, value in optimizer.optimizer.state[master].items():
            add(key, value if torch.is_tensor(value) else torch.tensor([int(value)]))
    return {name: found.hexdigest()[:16] for name, found in hashes.items()}


def save(engine: Any, folder: Path) -> str:
    """A hash of the checkpoint's tensors, written while the update may be in progress."""
    engine.save_checkpoint(str(folder), tag="one")
    digest = hashlib.sha256()
    rank = torch.distributed.get_rank()
    for file in sorted((folder / "one").glob(f"*_{rank}_*optim_states.pt")):
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]
        for part in state["fp32_flat_groups"]:
            digest.update(part.detach().cpu().numpy().tobytes())
        for values in state["optimizer_state_dict"]["state"].values():
            digest.update(values["exp_avg"].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_and_load(engine: Any, folder: Path) -> str:
    said = save(engine, folder)
    engine.load_checkpoint(str(folder), tag="one")
    fused_step.share_gradients(engine.optimizer)
    return said


def read_state(engine: Any, folder: Path) -> str:
    """By DeepSpeed's public functions: master weight, moment and gradient of the last parameter; its gathered weight."""
    last = [*engine.module.parameters()][-2]
    digest = hashlib.sha256()
    for value in (
        deepspeed.utils.safe_get_full_fp32_param(last),
        deepspeed.utils.safe_get_full_optimizer_state(last, "exp_avg"),
        deepspeed.utils.safe_get_full_grad(last),
    ):
        digest.update(value.detach().float().cpu().numpy().tobytes())
    with deepspeed.zero.GatheredParameters([last]):
        digest.update(last.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def set_state(engine: Any, folder: Path) -> str:
    """A master weight and a moment are replaced while the update may be in progress."""
    last = [*engine.module.parameters()][-2]
    deepspeed.utils.safe_set_full_fp32_param(last, torch.full(last.ds_shape, 0.5))
    deepspeed.utils.safe_set_full_optimizer_state(last, torch.zeros(last.ds_shape), "exp_avg")
    return ""


def export(engine: Any, folder: Path) -> str:
    state = engine._zero3_consolidated_16bit_state_dict()
    values = sorted((state or {}).items())
    return hashlib.sha256(b"".join(v.float().cpu().numpy().tobytes() for _, v in values)).hexdigest()[:16]


EVENTS = {"save": save, "save and load": save_and_load, "read": read_state, "set": set_state, "export": export}


def train(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    config = from_dict(json.loads(case["config"]))
    config.optimizer.overlap_step = case["overlap"]
    run = resolve(config)
    arenas = role_memory.arenas_of(run, rank)
    device = torch.device("cuda", rank) if config.launch.device is Device.cuda else torch.device("cpu")
    network = model.build(run, device, arenas)
    engine = engines.build(run, network, arenas)
    optimizer = engine.optimizer
    layers, event = network.model.layers, case.get("event", "")
    said: dict[str, Any] = {"loss": [], "norm": [], "learning_rate": []}
    for iteration in range(config.train.iterations):
        said["learning_rate"].append(engine.get_lr()[0])
        for step in range(config.train.gradient_accumulation_steps):
            tokens = data.batch(config, iteration, step, rank).to(device)
            # A layer is left out of one micro-batch: nothing fetches its weights there.
            network.model.layers = layers[:-1] if event == "unused" and iteration == 2 else layers
            loss = engine(input_ids=tokens, labels=tokens).loss
            said["loss"].append(float(loss))
            engine.backward(loss * float("inf") if event == "overflow" and iteration == 2 else loss)
            engine.step()
        said["norm"].append(float(engine.get_global_grad_norm() or 0))
        if iteration == 2 and event in EVENTS:
            said["event"] = EVENTS[event](engine, folder)
    said["beside"] = optimizer.updates._job is not None
    said["on_device"] = sum(m.numel() for m in optimizer.fp32_partitioned_groups_flat if m.is_cuda)
    optimizer.updates.finish()
    said |= {"hash": hash_of(optimizer), "skipped": engine.skipped_steps, "steps": engine.global_steps}
    engine.destroy()
    return said


def main() -> None:
    gc.freeze()  # what is imported stays, as in a worker: DeepSpeed looks for garbage at every start of an engine
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = os.environ["DS_ACCELERATOR"] == "cuda"
    # As a worker does: without it, DeepSpeed would compile an operator of its own, beside other tests that do.
    operators.load(select(from_dict(json.loads(next(iter(cases.values()))["config"]))), say=print)
    if cuda:
        torch.cuda.set_device(rank)
    deepspeed.init_distributed(
        "nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
    )
    real, said = host_optimizer.prepared, {}
    for name, case in cases.items():
        undo: list[Callable[[], None]] = []
        plant(case.get("fault", ""), undo)
        if case.get("share"):
            share_on_the_host(case["share"], undo)
        order, delay_s = case.get("order", ""), case.get("delay_s", 0.0)
        if case["overlap"] and (order or case.get("fault")):
            slow = lambda tasks, order=order, delay_s=delay_s: SlowUpdate(tasks, order, delay_s)  # noqa: E731
            vars(update_overlap)["prepared"] = slow
        try:
            said[name] = train(case, rank, folder / name)
        except (AssertionError, RuntimeError) as error:  # a planted fault may end so, which the test sees
            said[name] = {"error": f"{type(error).__name__}: {error}"}
            if not case.get("fault"):
                raise
        finally:
            vars(update_overlap)["prepared"] = real
            for take_back in undo:
                take_back()
        (folder / f"rank-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
