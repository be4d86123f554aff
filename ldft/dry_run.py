"""What would run, without running it: of one run processes, DeepSpeed config, expected bytes and files, of a sweep's cells a
line each. Writes nothing, imports no torch.
"""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ldft import checks, cpu_limits, environment, fit, placement_view, runner
from ldft.binding import cores_of_ranks
from ldft.config import Config, DataKind, Device, OffloadDevice, Weights, run_id
from ldft.errors import CombinationError, ConfigError
from ldft.memory import estimate, shapes, vram
from ldft.memory.topology import read_topology
from ldft.placement_view import gib
from ldft.training import attention, deepspeed_config, liger, moved

_LIST_RANKS = 4


def describe(config: Config) -> str:
    """The text that a dry run prints. Raises ConfigError where the run would be invalid."""
    with _machine(config):
        return _describe(config)


def _machine(config: Config) -> AbstractContextManager[None]:
    """The machine of the question: this one, or one with GPUs where launch.device=cuda is asked for on a machine without."""
    checks.resolve(config)
    if config.launch.device is Device.cuda and not environment.gpus():
        return environment.assumed_gpus(config.launch.num_ranks, config.memory.vram_gib or None)
    return nullcontext()


def _describe(config: Config) -> str:
    _check(config)
    settings = deepspeed_config.build(config)
    lines = ["ldft: dry run: nothing is started or written", *_what(config, settings), *_processes(config)]
    lines += [
        *(f"warning: {warning}" for warning in checks.warnings(config)),
        *(f"note: {note}" for note in [*moved.notes(config, settings), *placement_view.notes(config)]),
        *_bytes(config),
        *placement_view.lines(config, read_topology()),
        *_files(config),
        "DeepSpeed config:",
        json.dumps(settings, indent=2),
    ]
    return "\n".join(lines)


def _check(config: Config) -> None:
    config.validate()
    checks.check_machine(config)
    checks.check_inputs(config, fetch=False)


def summarize(config: Config) -> tuple[str, str]:
    """One cell of a sweep: what would become of it (`fits`, `does not fit`, `skipped`, `invalid`), and the line that says so."""
    try:
        with _machine(config):
            _check(config)
            fit.check(config)
    except fit.DoesNotFitError as error:
        return "does not fit", f"does not fit: {error.shortage}"
    except CombinationError as error:
        return "skipped", f"skipped: {error}"
    except ConfigError as error:
        return "invalid", f"invalid: {error}"
    device = f", VRAM {gib(sum(vram.device_bytes(config).values()))} each" * (config.launch.device is Device.cuda)
    return "fits", f"fits: host {gib(estimate.predicted_host_bytes(config))}{device}"


def _what(config: Config, settings: dict[str, Any]) -> list[str]:
    model, train = config.model, config.train
    exact = "" if model.family in shapes.FAMILIES else "about "
    weights = f"pretrained, from {model.path or 'the hub: ' + model.hf_id}"
    if model.weights is Weights.random:
        weights = f"random, train.seed={train.seed}"
    sequences = train.micro_batch_size * train.gradient_accumulation_steps * config.launch.num_ranks
    data = f"{config.data.kind.name}{f', {config.data.path}' if config.data.kind is DataKind.text else ''}"
    return [
        f"model: {model.name}, {model.family}, {model.num_layers} layers, {exact}{shapes.num_parameters(model):,} parameters",
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
    return f"LoRA of rank {config.lora.rank} trains {shapes.total(shapes.trained_sizes(config)):,} parameters"


def _processes(config: Config) -> list[str]:
    ranks, device = config.launch.num_ranks, config.launch.device.name
    resolved = checks.resolution(config)
    command = shlex.join([Path(sys.executable).name, "-m", "ldft.worker", "<attempt>"])
    lines = [f"resolved: {resolved}"] if resolved else []
    lines.append(f"processes: {ranks} x {command} on {device}")
    if environment.gpus_are_assumed():
        return lines
    quota = cpu_limits.quota()
    for rank, cores in enumerate(cores_of_ranks(ranks, device)[:_LIST_RANKS]):
        threads = cpu_limits.threads(cores, ranks, quota)
        lines.append(f"  rank {rank}: {len(cores)} cores ({_ranges(cores)}), OMP_NUM_THREADS={threads}")
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
    roles, others = estimate.host_bytes(config), estimate.other_bytes(config)
    lines = [f"expected host memory, all ranks: {gib(estimate.predicted_host_bytes(config))}"]
    lines += [f"  {part}: {gib(ranks * value)}" for part, value in (roles | others).items()]
    moments = vram.moments(config)
    peak = max(moments, key=lambda moment: sum(moments[moment].values()))
    where = "VRAM" if config.launch.device is Device.cuda else "host memory in the device's place"
    lines.append(f"expected {where}, each rank: {gib(sum(moments[peak].values()))}, at its peak ({peak})")
    lines += [f"  {part}: {gib(value)}" for part, value in moments[peak].items()]
    free, vram_gib = fit.available(config), fit.device_gib(config)
    size = f" of {vram_gib:.1f} GiB" if vram_gib else ""
    if environment.gpus_are_assumed():
        unknown = "" if vram_gib else ", of unknown size: memory.vram_gib=80, say, holds the estimate against it"
        lines.append(
            f"a machine that is not here: {gib(free.bytes)} of host memory by {free.limit}; "
            f"GPUs: {config.launch.num_ranks}{size}, assumed to be Hopper{unknown}"
        )
    else:
        lines.append(
            f"this machine: {environment.host_memory_gib():.1f} GiB of host memory, {gib(free.bytes)} free by {free.limit}; "
            f"GPUs: {len(environment.gpus())}{size}"
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
    folder = runner.results_dir(config) / run_id(config) / "attempt-<n>"
    return [f"files: {folder}/", "  config.json started.json rank-<r>.json worker-<r>.log row.parquet"]
