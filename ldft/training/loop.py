"""The timed loop.

An iteration lasts from one barrier and device synchronisation to the next; its time, and the times of its parts, are those of the
slowest rank. On CUDA the parts are read from events, so that timing adds no waits inside the iteration.

An update beside the next forward pass runs only while the clock runs: it is paused between iterations, and the last iteration ends
its own. So the sum of all iterations has every update in it, and a training step's price is in the iterations that pay for it.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ldft.config import Config
from ldft.memory.probe import GIB
from ldft.training import data
from ldft.training.deepspeed.update_overlap import Updates, UpdateTimes


@dataclass(slots=True)
class Samples:
    """Raw samples of every iteration so far, in seconds; the same on all ranks."""

    iteration_s: list[float] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    skipped_updates: list[int] = field(default_factory=list)
    loss_tokens: list[int] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    update_wait_s: list[float] = field(default_factory=list)
    update_overlapped_gib: list[float] = field(default_factory=list)


class Clock:
    """Time stamps in the order of the device's work; their differences, in seconds, are available after synchronising the
    device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def differences_s(self) -> list[float]:
        pairs = itertools.pairwise(self._marks)
        return [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs]


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def run(
    config: Config,
    engine: Any,
    device: torch.device,
    report: Callable[[Samples], None],
    watch: Callable[[int], AbstractContextManager[None]],
    updates: Updates | None = None,
) -> Samples:
    """Train for `train.iterations` updates. report: called after each with all samples so far. watch: a context around each.
    updates: those of the fused step, if it updates the weights."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    steps = config.train.gradient_accumulation_steps
    samples = Samples()
    # Python's garbage collector would run at arbitrary moments; run it between iterations instead.
    gc.collect()
    gc.freeze()
    gc.disable()
    for iteration in range(config.train.iterations):
        batches = [data.micro_batch(config, iteration, step, rank).to(device) for step in range(steps)]
        clock = Clock(device)
        losses = []
        learning_rate, skipped = float(engine.get_lr()[0]), engine.skipped_steps
        before = updates.times if updates else UpdateTimes()
        _settle(device)
        start = time.perf_counter()
        if updates:
            updates.resume()
        clock.mark()
        with watch(iteration):
            for batch in batches:
                loss = batch.weighted(engine(**batch.inputs).loss)
                clock.mark()
                engine.backward(loss)
                clock.mark()
                engine.step()
                clock.mark()
                losses.append(loss.detach())
            if updates and iteration == config.train.iterations - 1:
                updates.finish()
        if updates:
            updates.pause()
        _settle(device)
        total_s = time.perf_counter() - start
        parts = clock.differences_s()
        mean_loss = float(torch.stack(losses).float().mean())
        took = (updates.times if updates else UpdateTimes()) - before
        times = (took.update_s, took.wait_s, took.overlapped / GIB)
        mine = [total_s, *(sum(parts[part::3]) for part in range(3)), mean_loss, *times]
        table = torch.empty(ranks, len(mine), dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(table, torch.tensor([mine], dtype=torch.float64, device=device))
        slowest = table[table[:, 0].argmax()].tolist()
        samples.iteration_s.append(slowest[0])
        samples.forward_s.append(slowest[1])
        samples.backward_s.append(slowest[2])
        samples.step_s.append(slowest[3])
        samples.loss.append(float(table[:, 4].mean()))
        if updates:
            samples.update_s.append(slowest[5])
            samples.update_wait_s.append(slowest[6])
            samples.update_overlapped_gib.append(float(table[:, 7].sum()))
        samples.learning_rate.append(learning_rate)
        samples.skipped_updates.append(engine.skipped_steps - skipped)
        samples.loss_tokens.append(data.loss_tokens(config, iteration))
        gc.collect()
        report(samples)
    gc.enable()
    return samples
