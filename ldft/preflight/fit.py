"""Whether a run can fit this machine, from the estimate and before any memory is touched. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ldft import environment
from ldft.config import Config, Device
from ldft.errors import ConfigError
from ldft.memory.limits import Free, free_memory, free_on_node
from ldft.memory.policy import Placement
from ldft.memory.topology import Topology, read_topology
from ldft.preflight import device_estimate, host_estimate, placement_text, role_placement

GIB = 2**30

# What makes a term smaller.
_REMEDIES = {
    "layer inputs": "checkpointing=cpu, or a shorter seq_len",
    "activations": "checkpointing=gpu, or a shorter seq_len",
    "attention outputs": "checkpointing.keep_attention=host or none, or a shorter seq_len",
    "attention mask": "a shorter seq_len, or attention=flash_attention_2 where it runs",
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
    """The run needs more memory than there is; `shortage` says of what, how much and what for."""

    def __init__(self, shortage: str, remedy: str) -> None:
        self.shortage = shortage
        super().__init__("force", f"false, and {shortage}; use {remedy}, or force=true to try all the same")


def predictions(config: Config) -> dict[str, Any]:
    """The row's columns: predicted peaks, and what they consist of."""
    host = host_estimate.host_bytes(config) | host_estimate.other_bytes(config)
    columns: dict[str, Any] = {
        "predicted_host_gib": host_estimate.predicted_host_bytes(config) / GIB,
        "predicted_host_json": json.dumps({name: size / GIB for name, size in host.items()}),
    }
    if config.launch.device is Device.cuda:
        device = device_estimate.device_bytes(config)
        columns["predicted_vram_gib"] = sum(device.values()) / GIB
        columns["predicted_vram_json"] = json.dumps({name: size / GIB for name, size in device.items()})
    if seconds := placement_text.modelled_s(config, read_topology()):
        columns["modelled_traffic_s"] = sum(seconds.values())
    return columns


def check(config: Config) -> None:
    """Raise DoesNotFitError, one line, where the estimate is more than the machine has; `force` lets the run try."""
    if not config.force:
        examine(config)


def examine(config: Config) -> None:
    """The same, whatever `force` says."""
    _check_device(config)
    _check_host(config)
    _check_nodes(config, read_topology())


def _check_device(config: Config) -> None:
    have = environment.gpu_memory_gib() if config.launch.device is Device.cuda else None
    if have is None:
        return
    parts = device_estimate.least_bytes(config)
    need = sum(parts.values()) * (1 + device_estimate.FRAGMENTATION) + device_estimate.CONTEXT
    if need > have * GIB:
        raise _refusal("VRAM", need, f"{have:.1f} GiB on the smallest GPU", parts)


def _check_host(config: Config) -> None:
    free = available(config)
    need = host_estimate.predicted_host_bytes(config)
    if need > free.bytes:
        roles = host_estimate.host_bytes(config) | host_estimate.other_bytes(config)
        parts = {name: config.launch.num_ranks * size for name, size in roles.items()}
        raise _refusal(
            "host memory", need, f"{free.bytes / GIB:.1f} GiB free by {free.limit}", parts, _largest_on_device(config)
        )


def _largest_on_device(config: Config) -> str:
    parts = device_estimate.device_bytes(config)
    return max(parts, key=lambda name: parts[name])


def available(config: Config) -> Free:
    """What all ranks together may touch: no more than memory.capacity_gib, where that is less than there is."""
    capacity = int(config.memory.capacity_gib * GIB)
    free = free_memory(capacity or None)
    return Free(bytes=capacity, limit="memory.capacity_gib") if 0 < capacity < free.bytes else free


def _check_nodes(config: Config, topology: Topology) -> None:
    """Where a placement leaves no choice, each node must hold its part. One node is the whole machine: checked already."""
    if len(topology.nodes) == 1:
        return
    for node, parts in bytes_by_node(config, topology).items():
        free = free_on_node(node)
        if free is not None and sum(parts.values()) > free:
            raise _refusal(f"memory of node {node}", sum(parts.values()), f"{free / GIB:.1f} GiB free there", parts)


def bytes_by_node(config: Config, topology: Topology) -> dict[int, dict[str, float]]:
    """Node -> role -> bytes of all ranks that have to be there."""
    sizes = host_estimate.host_bytes(config)
    process = config.numa.placement.resolve(topology, "numa")
    found: dict[int, dict[str, float]] = {}
    for placements in role_placement.assign(config, topology):
        for role, size in sizes.items():
            placement = process if placements[role].kind == "default" else placements[role]
            for node, share in _strict_shares(placement).items():
                parts = found.setdefault(node, {})
                parts[role] = parts.get(role, 0.0) + size * share
    return found


def _strict_shares(placement: Placement) -> Mapping[int, float]:
    return {} if placement.kind in ("default", "preferred") else placement.shares() or {}


def _refusal(what: str, need: float, have: str, parts: Mapping[str, float], on_device: str = "") -> DoesNotFitError:
    """on_device: what is largest in the device part, which without a GPU lies in host memory."""
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    terms = ", ".join(f"{name} {parts[name] / GIB:.1f}" for name in largest)
    remedy = _REMEDIES.get(on_device if largest[0] == "device part" else largest[0], _STATES)
    growing = "; set memory.capacity_gib where the machine grows as memory is touched" if "Mem" in have else ""
    shortage = f"{what} does not suffice: {need / GIB:.1f} GiB expected, {have} (largest: {terms})"
    return DoesNotFitError(shortage, remedy + growing)
