"""Checks by estimate, before any memory is touched, whether a run fits this machine. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ldft import environment
from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.memory.limits import Free, free_memory, free_on_node
from ldft.memory.policy import Placement
from ldft.preflight import device_estimate, placement_text
from ldft.preflight.resolved import Resolved, device_gib

GIB = 2**30

# How to make each part of the estimate smaller.
_REMEDIES = {
    "layer inputs": "checkpointing=cpu, or a shorter seq_len",
    "activations": "checkpointing=gpu, or a shorter seq_len",
    "attention outputs": "checkpointing.keep_attention=host or none, or a shorter seq_len",
    "attention mask": "a shorter seq_len, or attention=flash_attention_2 if it runs here",
    "inside a layer": "a shorter seq_len or a smaller train.micro_batch_size",
    "logits": "a shorter seq_len or a smaller train.micro_batch_size",
    "weights": "offload=full",
    "optimizer": "offload=full",
    "gradients": "offload=full",
    "fp32 gradients": "offload=full",
    "gathered weights": "a smaller stage3_max_live_parameters in offload.deepspeed.zero_optimization",
    "torch's pinned allocator": "memory.pinning=exact",
    "process": "fewer ranks",
}
_STATES = "a smaller model, or more memory"


class DoesNotFitError(ConfigError):
    """The run needs more memory than available; `shortage` says which memory, how much, and for what; `remedy` what to
    do. of_device: of the GPU's, not the host's."""

    def __init__(self, shortage: str, remedy: str, of_device: bool = False) -> None:
        self.shortage, self.of_device = shortage, of_device
        self.remedy = f"use {remedy}, or force=true to try anyway"
        super().__init__("force", f"false, and {shortage}; {self.remedy}")


def predictions(run: Resolved) -> dict[str, Any]:
    """The row's columns: predicted peaks and their parts."""
    estimate = run.estimate
    columns: dict[str, Any] = {
        "predicted_host_gib": run.config.launch.num_hosts * estimate.host_bytes / GIB,
        "predicted_host_json": json.dumps({n: size / GIB for n, size in {**estimate.roles, **estimate.others}.items()}),
    }
    if run.config.launch.device is Device.cuda:
        columns["predicted_vram_gib"] = sum(estimate.device.values()) / GIB
        columns["predicted_vram_json"] = json.dumps({name: size / GIB for name, size in estimate.device.items()})
    if seconds := placement_text.modelled_s(run):
        columns["modelled_traffic_s"] = sum(seconds.values())
    return columns


def check(run: Resolved) -> None:
    """Raise DoesNotFitError if the estimate exceeds the machine's memory, unless `force` is set."""
    if not run.config.force:
        examine(run)


def examine(run: Resolved) -> None:
    """Like check, but regardless of `force`."""
    _check_device(run)
    _check_host(run)
    _check_nodes(run)


def _check_device(run: Resolved) -> None:
    config = run.config
    have = device_gib(config) if config.launch.device is Device.cuda else None
    if have is None:
        return
    parts = device_estimate.least_of(run.estimate.moments)
    need = sum(parts.values()) * (1 + device_estimate.FRAGMENTATION) + device_estimate.CONTEXT
    if need > have * GIB:
        limit = "by memory.vram_gib" if have == config.memory.vram_gib else "on the smallest GPU"
        raise _refusal("VRAM", need, f"{have:.1f} GiB {limit}", parts)


def _check_host(run: Resolved) -> None:
    free = available(run.config)
    estimate = run.estimate
    if estimate.host_bytes > free.bytes:
        have = f"{free.bytes / GIB:.1f} GiB free by {free.limit}"
        parts = {name: estimate.num_ranks * size for name, size in {**estimate.roles, **estimate.others}.items()}
        largest = max(estimate.device, key=lambda name: estimate.device[name])
        raise _refusal("host memory", estimate.host_bytes, have, parts, largest)


def available(config: Config) -> Free:
    """Memory that all ranks together may touch: at most memory.capacity_gib, if that is less than the free memory."""
    capacity = int(config.memory.capacity_gib * GIB)
    assumed = environment.assumed_host_gib()
    if capacity and environment.gpus_are_assumed():  # this machine's limits do not apply to the assumed one
        return Free(bytes=capacity, limit="memory.capacity_gib")
    if assumed is not None:
        return Free(bytes=int(assumed * GIB), limit="machine.host_gib")
    free = free_memory(capacity or None)
    return Free(bytes=capacity, limit="memory.capacity_gib") if 0 < capacity < free.bytes else free


def _check_nodes(run: Resolved) -> None:
    """Check that each node can hold the part that strict placements put there. A single node is the whole machine: already
    checked."""
    if len(run.topology.nodes) == 1:
        return
    for node, parts in bytes_by_node(run).items():
        free = run.topology.node(node).total_bytes if environment.gpus_are_assumed() else free_on_node(node)
        if free is not None and sum(parts.values()) > free:
            raise _refusal(f"memory of node {node}", sum(parts.values()), f"{free / GIB:.1f} GiB free there", parts)


def bytes_by_node(run: Resolved) -> dict[int, dict[str, float]]:
    """Node -> role -> bytes of all ranks that must be on that node."""
    process = run.config.numa.placement.resolve(run.topology, "numa")
    found: dict[int, dict[str, float]] = {}
    for placements in run.placements:
        for role, size in run.estimate.roles.items():
            placement = process if placements[role].kind == "default" else placements[role]
            for node, share in _strict_shares(placement).items():
                parts = found.setdefault(node, {})
                parts[role] = parts.get(role, 0.0) + size * share
    return found


def _strict_shares(placement: Placement) -> Mapping[int, float]:
    return {} if placement.kind in ("default", "preferred") else placement.shares() or {}


def _refusal(what: str, need: float, have: str, parts: Mapping[str, float], on_device: str = "") -> DoesNotFitError:
    """on_device: the largest part of the device estimate, which without a GPU is in host memory."""
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    terms = ", ".join(f"{name} {parts[name] / GIB:.1f}" for name in largest)
    remedy = _REMEDIES.get(on_device if largest[0] == "device part" else largest[0], _STATES)
    growing = "; set memory.capacity_gib if the machine grows as memory is touched" if "Mem" in have else ""
    shortage = f"not enough {what}: {need / GIB:.1f} GiB expected, {have} (largest: {terms})"
    return DoesNotFitError(shortage, remedy + growing, of_device=what == "VRAM")
