"""What this machine allows. Runs only where the cell runs; raises ConfigError with one line."""

from __future__ import annotations

import os
from pathlib import Path

from ldft import environment
from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.memory.topology import read_topology


def resolve_device(config: Config) -> None:
    """Replace launch.device=auto by what the machine has."""
    if config.launch.device is Device.auto:
        config.launch.device = Device.cuda if environment.gpus() else Device.cpu


def check_machine(config: Config) -> None:
    """Raise ConfigError where the config asks for what this machine does not have."""
    config.numa.placement.resolve(read_topology(), "numa")
    gpus = environment.gpus()
    if config.launch.device is Device.cuda:
        if not gpus:
            raise ConfigError("launch.device", "cuda: no NVIDIA GPU is visible here; use launch.device=cpu")
        if config.launch.num_ranks > len(gpus):
            raise ConfigError(
                "launch.num_ranks",
                f"{config.launch.num_ranks} ranks need as many GPUs, {len(gpus)} visible; use 1 to {len(gpus)}",
            )


def check_results_dir(folder: Path) -> None:
    """Create the results folder; raise ConfigError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "results.dir", f"cannot create {folder} ({error.strerror}); choose a folder you can write"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("results.dir", f"cannot write in {folder}; choose a folder you can write")
