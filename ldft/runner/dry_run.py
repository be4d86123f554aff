"""Dry runs: show what would run without running it. For a single run: processes, DeepSpeed config, expected bytes and files; for a
sweep: one line per cell. Writes nothing, imports no torch.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from ldft import environment
from ldft.config import Config, Device, OffloadDevice, Weights, run_id
from ldft.errors import CombinationError, ConfigError
from ldft.planning import settled
from ldft.preflight import (
    assumed_machine,
    attention,
    device_inputs,
    fit,
    parameter_counts,
    placement_text,
    sequence_parallel,
)
from ldft.preflight.placement_text import gib
from ldft.preflight.resolved import Resolved, device_gib
from ldft.runner import checks, cpu_limits, measured, parent
from ldft.runner.core_binding import cores_of_ranks
from ldft.terminal import plural

_LIST_RANKS = 4


def describe(config: Config) -> str:
    """The text that a dry run prints. Raises ConfigError if the run would be invalid."""
    checks.resolve(config)
    with assumed_machine.assumed(config):
        return _describe(config)


def _describe(config: Config) -> str:
    run, inputs = _check(config)
    notes = [*checks.notes(run), *inputs]
    lines = ["ldft: dry run: nothing is started or written", *_what(run), *_processes(config)]
    lines += [
        *(f"warning: {warning}" for warning in checks.warnings(run)),
        *(f"note: {note}" for note in notes),
        *_bytes(run),
        *_times(run),
        *placement_text.lines(run),
        *_files(config),
        "DeepSpeed config:",
        json.dumps(run.deepspeed, indent=2),
    ]
    return "\n".join(lines)


def _check(config: Config) -> tuple[Resolved, list[str]]:
    """The resolved run, and notes on its files. Raises ConfigError."""
    config.validate()
    run = checks.check_machine(config)
    return run, checks.check_inputs(run, fetch=False)


def summarize(config: Config) -> tuple[str, str]:
    """One cell of a sweep: its outcome (`fits`, `does not fit`, `skipped`, `invalid`) and the line that explains it."""
    try:
        checks.resolve(config)
        with assumed_machine.assumed(config):
            run, _ = _check(config)
            fit.check(run)
    except fit.DoesNotFitError as error:
        return "does not fit", f"does not fit: {error.shortage}"
    except CombinationError as error:
        return "skipped", f"skipped: {error}"
    except ConfigError as error:
        return "invalid", f"invalid: {error}"
    device = f", VRAM {gib(sum(run.estimate.device.values()))} each" * (config.launch.device is Device.cuda)
    return "fits", f"fits: host {gib(run.estimate.host_bytes)}{device}"


def _what(run: Resolved) -> list[str]:
    config = run.config
    model, train = config.model, config.train
    weights = f"pretrained, from {model.path or 'the hub: ' + model.hf_id}"
    if model.weights is Weights.random:
        weights = f"random, train.seed={train.seed}"
    sequences = config.sequences_per_update
    data = f"{config.data.kind.name}{f', {config.data.path}' if config.data.reads_file else ''}"
    parameters = f"{parameter_counts.num_parameters(model):,} parameters"
    return [
        f"model: {model.name}, {model.family}, {plural(model.num_layers, 'layer')}, {parameters}",
        f"weights: {weights}; data: {data}",
        f"attention: {_attention(run)}; Liger Kernel: {'yes' if run.liger else 'no'}; "
        f"MLP: {f'in {run.mlp_tiles} tiles' if run.mlp_tiles > 1 else 'whole'}; {_trained(config)}",
        f"update: {config.optimizer.name}, {_updated_by(run)}",
        *_layer_inputs(run),
        f"iteration: {plural(sequences, 'sequence')} of {config.seq_len.tokens} tokens = {sequences * config.seq_len.tokens:,} "
        f"tokens, {plural(train.iterations, 'iteration')} of which {train.warmup_iterations} warm-up, {train.precision.name}",
        *_shared(config),
    ]


def _attention(run: Resolved) -> str:
    """As the row will have it."""
    kernel = attention.REPEATED_HEADS if run.repeats_heads else run.attention.name
    return sequence_parallel.attention_name(kernel, run.config)


def _shared(config: Config) -> list[str]:
    ranks = config.launch.sequence_parallel
    if ranks == 1:
        return []
    return [f"sequences: each is shared by {ranks} ranks, {config.seq_len.tokens // ranks} tokens on each"]


def _layer_inputs(run: Resolved) -> list[str]:
    if not device_inputs.waits(run.config):
        return []
    kept = run.config.checkpointing.groups(run.config.model.num_layers)
    stay = min(kept, run.device_inputs)
    return [f"layer inputs: {kept} kept; the last {stay} on the device, the others in host memory"]


def _updated_by(run: Resolved) -> str:
    config = run.config
    if run.fused_step:
        where = "beside the next forward pass" if run.overlap_step else f"within the step: {run.no_overlap}"
        text = f"by ldft's fused step in host memory, {where}"
        part, _, why = run.about_share.partition(": ")
        share = f"none, since {why}" if part == "none" else run.about_share
        return f"{text}; on the GPU: {share}" if share else text
    if config.offload.optimizer is OffloadDevice.none:
        return "on the device" if config.launch.device is Device.cuda else "in host memory in the device's place"
    return "by DeepSpeed's own step in host memory"


def _trained(config: Config) -> str:
    if not config.lora.rank:
        return "every weight is trained"
    return f"LoRA of rank {config.lora.rank} trains {parameter_counts.total(parameter_counts.trained_sizes(config)):,} parameters"


def _processes(config: Config) -> list[str]:
    ranks, device = config.launch.num_ranks, config.launch.device.name
    command = shlex.join([Path(sys.executable).name, "-m", "ldft.worker", "<attempt>"])
    lines = [f"resolved: {line}" for line in checks.resolutions(config)]
    lines.append(f"processes: {ranks} x {command} on {device}")
    if environment.gpus_are_assumed():
        return lines
    quota = cpu_limits.quota()
    for rank, cores in enumerate(cores_of_ranks(ranks, device)[:_LIST_RANKS]):
        threads = cpu_limits.threads(cores, ranks, quota)
        lines.append(f"  rank {rank}: {plural(len(cores), 'core')} ({_ranges(cores)}), OMP_NUM_THREADS={threads}")
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


def _bytes(run: Resolved) -> list[str]:
    config, estimate = run.config, run.estimate
    ranks = config.launch.num_ranks
    lines = [f"expected host memory, all ranks: {gib(estimate.host_bytes)}"]
    lines += [f"  {part}: {gib(ranks * value)}" for part, value in {**estimate.roles, **estimate.others}.items()]
    where = "VRAM" if config.launch.device is Device.cuda else "host memory in the device's place"
    lines.append(f"expected {where}, each rank: {gib(sum(estimate.device.values()))}, at its peak ({estimate.peak})")
    lines += [f"  {part}: {gib(value)}" for part, value in estimate.device.items()]
    free, vram_gib = fit.available(config), device_gib(config)
    size = f" of {vram_gib:.1f} GiB" if vram_gib else ""
    if environment.gpus_are_assumed():
        unknown = "" if vram_gib else ", of unknown size: set e.g. memory.vram_gib=80 to check the estimate against it"
        lines.append(
            f"an assumed machine: {gib(free.bytes)} of host memory by {free.limit}; "
            f"GPUs: {config.launch.num_ranks}{size}, assumed to be Hopper{unknown}"
        )
    else:
        lines.append(
            f"this machine: {environment.host_memory_gib():.1f} GiB of host memory, {gib(free.bytes)} free by {free.limit}; "
            f"GPUs: {len(environment.gpus())}{size}"
        )
    try:
        fit.examine(run)
    except fit.DoesNotFitError as error:
        lines.append(
            f"does not fit here, but force=true runs it anyway: {error.shortage}"
            if config.force
            else f"does not fit here: {error.shortage}; {error.remedy}"
        )
    return lines


def _times(run: Resolved) -> list[str]:
    """Expected times, if the machine's rates are known."""
    if (found := settled.times(run)) is None:
        return []
    speed = measured.tokens_per_iteration(run.config) / found.iteration_s
    return [
        f"expected time: {found.iteration_s:.3f} s an iteration (forward {found.forward_s:.3f}, backward {found.backward_s:.3f}, "
        f"step {found.step_s:.3f}), {speed:.0f} tokens/s, bound by {found.bound}"
    ]


def _files(config: Config) -> list[str]:
    folder = parent.results_dir(config) / run_id(config) / "attempt-<n>"
    return [
        f"files: {folder}/",
        "  config.json deepspeed.json choices.json started.json rank-<r>.json worker-<r>.log row.parquet",
    ]
