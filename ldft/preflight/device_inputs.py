"""Chooses how many layer inputs stay on the device under checkpointing=cpu. Imports no torch.

A kept input takes as many bytes on the device as in host memory, and costs no time in either (docs/benchmarks.md). So the last one
stays, whose backward pass comes first, and more only where host memory would not hold the others: as few as are needed.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

from ldft.config import Config, Device
from ldft.config.checkpointing import CheckpointingMode
from ldft.preflight import room
from ldft.preflight.selection import Selection


def waits(config: Config) -> bool:
    """Whether layer inputs wait in host memory at all."""
    settings = config.checkpointing
    return settings.mode is CheckpointingMode.cpu and settings.recomputed(config.model.num_layers) > 0


def settle(run: Selection, vram_gib: Callable[[Config], float | None]) -> Selection:
    """The run with its number of inputs on the device. vram_gib: memory of each GPU, None if unknown."""
    config = run.config
    if not waits(config):
        return run
    if (asked := config.checkpointing.device_inputs) is not None:
        return dataclasses.replace(run, device_inputs=asked)
    if config.launch.device is Device.cpu:
        return run  # its device's memory is host memory
    size = vram_gib(config)
    if size is None or not room.host_shortage(run):
        return run
    counts = range(2, config.checkpointing.groups(config.model.num_layers) + 1)
    runs = [dataclasses.replace(run, device_inputs=count) for count in counts]
    # Each further input takes from the device what it leaves to the host, so both answers change once.
    possible = bisect.bisect_left(runs, True, key=lambda more: room.device_room(more, size) < 0)
    enough = bisect.bisect_left(runs, True, key=lambda more: room.host_shortage(more) == 0)
    return [run, *runs][min(possible, enough + 1)]
