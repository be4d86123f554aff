"""Checks a config against this machine, on the machine where the cell runs. Errors are one-line ConfigErrors."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from ldft import environment
from ldft.config import THIS, Config, Device, Goal, Precision, Weights
from ldft.config.root import FROM_FILE
from ldft.errors import ConfigError
from ldft.memory.topology import Topology
from ldft.planning import settled
from ldft.preflight import (
    assumed_machine,
    deepspeed_managed,
    deepspeed_refused,
    experts,
    families,
    parameter_counts,
    placement_text,
    resolved,
    sequence_parallel,
    windows,
)
from ldft.preflight.resolved import Resolved
from ldft.preflight.selection import Selection
from ldft.runner import cpu_limits, model_source, swap_files
from ldft.terminal import plural
from ldft.training import checkpoint_faults, safetensors_index, saved_config
from ldft.training.text import check as data_check


def resolve(config: Config) -> None:
    """Replace launch.device=auto and train.precision=auto by values for this machine, keys left to a config.json by its values, and
    those left to a plan by the plan's; record it in `asked`. Raises ConfigError if that file cannot be
    used."""
    model_source.fill(config)
    config.machine.validate()
    with assumed_machine.assumed(config):
        if config.launch.device is Device.auto:
            config.asked["launch.device"] = Device.auto.name
            config.launch.device = Device.cuda if environment.gpus() else Device.cpu
        if config.train.precision is Precision.auto:
            config.asked["train.precision"] = Precision.auto.name
            config.train.precision, _ = native_precision(config.launch.device)
    if config.machine.name != THIS and not config.numa.bandwidth:
        config.numa.bandwidth = assumed_machine.bandwidth(config.machine)
    with assumed_machine.assumed(config):
        settled.settle(config)


def native_precision(device: Device) -> tuple[Precision, str]:
    """The precision that train.precision=auto means on this machine, and the reason."""
    if device is Device.cpu:
        if environment.native_bf16():
            return Precision.bf16, "this CPU has bf16 instructions"
        return Precision.fp32, "this CPU has no bf16 instructions"
    lowest = environment.compute_capability()
    if lowest is None or (environment.gpus_are_assumed() and environment.assumed_host_gib() is None):
        return Precision.bf16, "no GPU here; it is assumed to be Hopper"
    if lowest >= (8, 0):
        return Precision.bf16, f"compute capability {lowest[0]}.{lowest[1]}"
    which = Precision.fp16 if lowest >= (7, 0) else Precision.fp32
    return which, f"compute capability {lowest[0]}.{lowest[1]}; bf16 needs 8.0"


def resolutions(config: Config) -> list[str]:
    """One line for the keys that were auto, with their values, and one for a model that a config.json defines; if there are any."""
    chosen = {"launch.device": config.launch.device.name, "train.precision": config.train.precision.name}
    text = ", ".join(f"{key}={chosen[key]}" for key in config.asked if key in chosen)
    because = f"; {native_precision(config.launch.device)[1]}" if "train.precision" in config.asked else ""
    lines = [f"{text} (auto{because})"] if text else []
    auto = config.asked.get(settled.DONE) == Goal.auto.name
    if settled.made(config):
        values = ", ".join(settled.overrides(config)) or "the defaults are best"
        lines.append(f"plan={config.plan.goal.name}{' (auto)' * auto}: {values}")
    elif auto and config.launch.device is Device.cuda:
        why = config.asked.get(settled.WHY_NONE) or settled.declined(config)
        lines.append(f"plan=none (auto; {why})")
    if model_source.ASKED in config.asked:
        lines.append(f"model {config.model.name} {config.asked[model_source.ASKED]}")
    return lines


def warnings(run: Resolved) -> list[str]:
    """Warnings about settings that work but are slow. Empty if the machine is an assumed one."""
    if environment.gpus_are_assumed():
        return []
    config, found = run.config, cpu_limits.warnings(run)
    if (
        config.launch.device is Device.cpu
        and config.train.precision is Precision.bf16
        and not environment.native_bf16()
    ):
        found.append(
            "train.precision=bf16: this CPU has no bf16 instructions; matrix products take about 50 times as long as in fp32 with "
            "AVX2, 4 times with AVX-512 (benchmarks/cpu_precision.py); train.precision=fp32 or auto avoids it"
        )
    return found


def notes(run: Resolved) -> list[str]:
    """What else a reader of the row must know about these settings."""
    return [
        *experts.notes(run.config),
        *sequence_parallel.notes(run.config),
        *deepspeed_managed.notes(run.config, run.deepspeed),
        *deepspeed_refused.notes(run.deepspeed),
        *placement_text.notes(run),
    ]


def check_machine(config: Config) -> Resolved:
    """The resolved run. Raises ConfigError if the config needs something that this machine lacks."""
    settled.check(config)
    topology = assumed_machine.topology(config)
    check_config(config, topology)
    return resolved.resolve(config, topology=topology)


def check_config(config: Config, topology: Topology) -> None:
    """Raise ConfigError if the config needs something that this machine lacks, whatever a plan would choose."""
    config.numa.placement.resolve(topology, "numa")
    gpus = environment.gpus()
    if config.launch.device is Device.cuda:
        if not gpus:
            raise ConfigError("launch.device", "cuda: no NVIDIA GPU is visible here; use launch.device=cpu")
        if config.launch.ranks_per_host > len(gpus):
            raise ConfigError(
                "launch.num_ranks",
                f"{plural(config.launch.ranks_per_host, 'rank')}, a GPU for each, {len(gpus)} visible; use at most {len(gpus)}",
            )

        lowest = environment.compute_capability()
        if config.train.precision is Precision.bf16 and lowest is not None and lowest < (8, 0):
            raise ConfigError(
                "train.precision",
                f"bf16 needs a GPU of compute capability 8.0 (Ampere) or higher, this one has {lowest[0]}.{lowest[1]}; use fp16",
            )
    families.check(config.model, families.causal())
    experts.check(config.model)
    windows.check(config.model)
    parameter_counts.check_adapted(config)


def check_joining(config: Config) -> None:
    """Raise ConfigError for what the first host of a run refuses before it waits for this one, as far as it shows without reading a
    model's config.json and without making a plan. config: as composed here."""
    if FROM_FILE in config.asked.values():
        return
    config = copy.deepcopy(config)
    goal, config.plan.goal = config.plan.goal, Goal.none
    resolve(config)
    config.plan.goal = goal
    config.validate()
    if goal is Goal.auto and settled.declined_everywhere(config):
        settled.settle(config)  # makes none, as on the first host
    if config.plan.goal is Goal.none or settled.DONE in config.asked:
        check_machine(config)
        return
    check_config(config, assumed_machine.topology(config))
    if goal is not Goal.longest:  # which chooses the tokens
        sequence_parallel.check_whatever_is_planned(config)


def check_inputs(run: Selection, *, fetch: bool) -> list[str]:
    """Notes on the files that the config names. Raises ConfigError if one cannot be used. fetch: download weights from the hub if
    needed."""
    config = run.config
    swap_files.check(config, run.deepspeed)
    notes = data_check.check(config) if config.data.reads_file else []
    if config.model.weights is Weights.pretrained and (fetch or config.model.path):
        path = safetensors_index.folder(config.model, fetch=fetch)
        checkpoint_faults.check(path, safetensors_index.index(path))
        notes += saved_config.check(config, path, given=model_source.ASKED in config.asked)
    return notes


def check_results_dir(folder: Path) -> None:
    """Create the results folder; raise ConfigError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "results.dir", f"cannot create {folder} ({error.strerror}); choose a folder you can write"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("results.dir", f"cannot write in {folder}; choose a folder you can write")
