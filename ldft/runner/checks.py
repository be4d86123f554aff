"""What this machine allows. Runs only where the cell runs; raises ConfigError with one line."""

from __future__ import annotations

import os
from pathlib import Path

from ldft import environment
from ldft.config import Config, DataKind, Device, Precision, Weights
from ldft.errors import ConfigError
from ldft.memory.topology import read_topology
from ldft.preflight import families, parameter_counts
from ldft.preflight.resolved import Resolved, resolve
from ldft.preflight.selection import Selection
from ldft.runner import swap_files
from ldft.training import safetensors_index, text


def resolve_device(config: Config) -> None:
    """Replace launch.device=auto by what the machine has."""
    if config.launch.device is Device.auto:
        config.launch.device = Device.cuda if environment.gpus() else Device.cpu


def check_machine(config: Config) -> Resolved:
    """The run, decided. Raises ConfigError where the config asks for what this machine does not have."""
    topology = read_topology()
    config.numa.placement.resolve(topology, "numa")
    gpus = environment.gpus()
    if config.launch.device is Device.cuda:
        if not gpus:
            raise ConfigError("launch.device", "cuda: no NVIDIA GPU is visible here; use launch.device=cpu")
        if config.launch.num_ranks > len(gpus):
            raise ConfigError(
                "launch.num_ranks",
                f"{config.launch.num_ranks} ranks need as many GPUs, {len(gpus)} visible; use 1 to {len(gpus)}",
            )

        lowest = environment.compute_capability()
        if config.train.precision is Precision.bf16 and lowest is not None and lowest < (8, 0):
            raise ConfigError(
                "train.precision",
                f"bf16 needs a GPU of compute capability 8.0 (Ampere) or newer, here is {lowest[0]}.{lowest[1]}; use fp16",
            )
    families.check(config.model, families.causal())
    parameter_counts.check_adapted(config)
    return resolve(config, topology=topology)


def check_inputs(run: Selection, *, fetch: bool) -> None:
    """Raise ConfigError where a file that the config names cannot be used. fetch: bring weights from the hub if need be."""
    config = run.config
    swap_files.check(config, run.deepspeed)
    if config.model.weights is Weights.pretrained and (fetch or config.model.path):
        safetensors_index.index(safetensors_index.folder(config.model, fetch=fetch))
    if config.data.kind is DataKind.text:
        text.check(config.data, config.model.vocab_size)


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
