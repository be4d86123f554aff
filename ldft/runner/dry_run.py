"""What would run, without running it: of one run processes, DeepSpeed config, expected bytes and files, of a sweep's cells a
line each. Writes nothing, imports no torch.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ldft import environment
from ldft.config import Config, DataKind, Device, OffloadDevice, Weights, run_id
from ldft.errors import CombinationError, ConfigError
from ldft.memory.topology import read_topology
from ldft.preflight import (
    attention,
    deepspeed_config,
    deepspeed_managed,
    device_estimate,
    fit,
    host_estimate,
    liger,
    parameter_counts,
    placement_text,
)
from ldft.preflight.placement_text import gib
from ldft.runner import checks, parent
from ldft.runner.core_binding import cores_of_ranks

_LIST_RANKS = 4


def describe(config: Config) -> str:
    """The text that a dry run prints. Raises ConfigError where the run would be invalid."""
    asked = config.launch.device
    _check(config)
    settings = deepspeed_config.build(config)
    lines = ["ldft: dry run: nothing is started or written", *_what(config, settings), *_processes(config, asked)]
    lines += [
        *(f"note: {note}" for note in [*deepspeed_managed.notes(config, settings), *placement_text.notes(config)]),
        *_bytes(config),
        *placement_text.lines(config, read_topology()),
        *_files(config),
        "DeepSpeed config:",
        json.dumps(settings, indent=2),
    ]
    return "\n".join(lines)


def _check(config: Config) -> None:
    checks.resolve_device(config)
    config.validate()
    checks.check_machine(config)
    checks.check_inputs(config, fetch=False)


def summarize(config: Config) -> tuple[str, str]:
    """One cell of a sweep: what would become of it (`fits`, `does not fit`, `skipped`, `invalid`), and the line that says so."""
    try:
        _check(config)
        fit.check(config)
    except fit.DoesNotFitError as error:
        return "does not fit", f"does not fit: {error.shortage}"
    except CombinationError as error:
        return "skipped", f"skipped: {error}"
    except ConfigError as error:
        return "invalid", f"invalid: {error}"
    device = f", VRAM {gib(sum(device_estimate.device_bytes(config).values()))} each" * (
        config.launch.device is Device.cuda
    )
    return "fits", f"fits: host {gib(host_estimate.predicted_host_bytes(config))}{device}"


def _what(config: Config, settings: dict[str, Any]) -> list[str]:
    model, train = config.model, config.train
    exact = "" if model.family in parameter_counts.FAMILIES else "about "
    weights = f"pretrained, from {model.path or 'the hub: ' + model.hf_id}"
    if model.weights is Weights.random:
        weights = f"random, train.seed={train.seed}"
    sequences = train.micro_batch_size * train.gradient_accumulation_steps * config.launch.num_ranks
    data = f"{config.data.kind.name}{f', {config.data.path}' if config.data.kind is DataKind.text else ''}"
    parameters = f"{exact}{parameter_counts.num_parameters(model):,} parameters"
    return [
        f"model: {model.name}, {model.family}, {model.num_layers} layers, {parameters}",
        f"weights: {weights}; data: {data}",
        f"attention: {attention.choose(config).name}; Liger Kernel: {'yes' if liger.wanted(config) else 'no'}; {_trained(config)}",
        f"update: {config.optimizer.name}, {_updated_by(config, settings)}",
        f"iteration: {sequences} sequences of {config.seq_len.tokens} tokens = {sequences * config.seq_len.tokens:,} tokens, "
        f"{train.iterations} iterations of which {train.warmup_iterations} warm-up, {train.precision.name}",
    ]


def _updated_by(config: Config, settings: dict[str, Any]) -> str:
    if deepspeed_config.fuses_step(config, settings):
        return "by ldft's fused step in host memory"
    if config.offload.optimizer is OffloadDevice.none:
        return "on the device" if config.launch.device is Device.cuda else "in host memory in the device's place"
    return "by DeepSpeed's own step in host memory"


def _trained(config: Config) -> str:
    if not config.lora.rank:
        return "every weight is trained"
    return f"LoRA of rank {config.lora.rank} trains {parameter_counts.total(parameter_counts.trained_sizes(config)):,} parameters"


def _processes(config: Config, asked: Device) -> list[str]:
    ranks, device = config.launch.num_ranks, config.launch.device.name
    chosen = " (launch.device=auto)" if asked is Device.auto else ""
    command = shlex.join([Path(sys.executable).name, "-m", "ldft.worker", "<attempt>"])
    lines = [f"processes: {ranks} x {command} on {device}{chosen}"]
    for rank, cores in enumerate(cores_of_ranks(ranks, device)[:_LIST_RANKS]):
        lines.append(f"  rank {rank}: {len(cores)} cores ({_ranges(cores)}), OMP_NUM_THREADS={len(cores)}")
    if ranks > _LIST_RANKS:
        lines.append(f"  and {ranks - _LIST_RANKS} more")
    return lines


def _ranges(cores: list[int]) -> str:
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def _bytes(config: Config) -> list[str]:
    ranks = config.launch.num_ranks
    roles, others = host_estimate.host_bytes(config), host_estimate.other_bytes(config)
    lines = [f"expected host memory, all ranks: {gib(host_estimate.predicted_host_bytes(config))}"]
    lines += [f"  {part}: {gib(ranks * value)}" for part, value in (roles | others).items()]
    moments = device_estimate.moments(config)
    peak = max(moments, key=lambda moment: sum(moments[moment].values()))
    where = "VRAM" if config.launch.device is Device.cuda else "host memory in the device's place"
    lines.append(f"expected {where}, each rank: {gib(sum(moments[peak].values()))}, at its peak ({peak})")
    lines += [f"  {part}: {gib(value)}" for part, value in moments[peak].items()]
    free = fit.available(config)
    vram_gib = environment.gpu_memory_gib()
    lines.append(
        f"this machine: {environment.host_memory_gib():.1f} GiB of host memory, {gib(free.bytes)} free by {free.limit}; "
        f"GPUs: {len(environment.gpus())}{f' of {vram_gib:.1f} GiB' if vram_gib else ''}"
    )
    try:
        fit.examine(config)
    except fit.DoesNotFitError as error:
        lines.append(
            f"does not fit here, and force=true tries: {error.shortage}"
            if config.force
            else f"does not fit here: {error}"
        )
    return lines


def _files(config: Config) -> list[str]:
    folder = parent.results_dir(config) / run_id(config) / "attempt-<n>"
    return [f"files: {folder}/", "  config.json started.json rank-<r>.json worker-<r>.log row.parquet"]
