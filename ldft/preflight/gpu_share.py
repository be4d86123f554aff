"""Chooses how much of the optimizer's state lives on the GPU although it is offloaded. Imports no torch.

An update beside the next forward pass (optimizer.overlap_step) cannot hide what that pass needs first, nor what takes longer than
the pass. So the front of the model, in the order of the forward pass, can be updated on the GPU: the embedding and some whole
layers. Their master weights and moments, and their weights and gradients in compute precision, are in device memory; a kernel
rounds as the CPU's does, so no loss changes. The share also grows where host memory would not hold the state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from ldft import environment
from ldft.config import Config, Device, OffloadDevice
from ldft.errors import CombinationError, ConfigError
from ldft.memory import bandwidths
from ldft.memory.cost_model import Bandwidths
from ldft.preflight import device_estimate, device_rates, layer_memory, parameter_counts, room
from ldft.preflight.selection import Selection
from ldft.terminal import plural

KEY = "offload.gpu_share"
# Of a datasheet's peak, the forward pass of a model reaches this at most: 0.53 was measured on an H100 (3B, 32768 tokens, cuDNN). A
# higher value means a shorter forward pass, and so a larger share.
_REACHED = 0.55
# Of its rate alone, the update keeps this beside the forward pass and its copies: 0.79 and 0.9 were measured on two hosts.
_BESIDE = 0.8


def settle(run: Selection, vram_gib: Callable[[Config], float | None]) -> Selection:
    """The run with its share. vram_gib: memory of each GPU, None if unknown. Raises CombinationError for a share that is not
    possible."""
    elements, why = _choose(run, vram_gib)
    return _with(run, elements, why)


def _with(run: Selection, elements: int, why: str) -> Selection:
    if not elements:
        return dataclasses.replace(run, gpu_share=0, about_share=why)
    zero = run.zero | {"sub_group_size": elements}  # the first sub-group ends exactly there
    settings = run.deepspeed | {"zero_optimization": zero}
    return dataclasses.replace(run, gpu_share=elements, about_share=why, deepspeed=settings)


def _choose(run: Selection, vram_gib: Callable[[Config], float | None]) -> tuple[int, str]:
    """Elements of one rank, and why."""
    config = run.config
    asked, obstacle = config.offload.gpu_share, _obstacle(run)
    if asked and obstacle:
        raise CombinationError(KEY, f"{asked:g}: {obstacle}; use 0, or leave it at null")
    if asked == 0 or obstacle:
        return 0, ""
    embedding, layer, whole = _sizes(config)
    most = config.model.num_layers
    if asked is not None:
        if asked == 1:
            return whole, "as requested"
        layers = min(most, max(0, round((asked * whole - embedding) / layer)))
        return embedding + layers * layer, f"as requested: the embedding and {plural(layers, 'layer')}"
    return _hiding(run, vram_gib(config), embedding, layer)


def _hiding(run: Selection, vram_gib: float | None, embedding: int, layer: int) -> tuple[int, str]:
    """The smallest share that hides the rest of the update, as far as VRAM allows."""
    wanted = _layers_that_hide(run.config, embedding, layer)
    if isinstance(wanted, str):
        return 0, f"none: {wanted}"
    if vram_gib is None:
        return 0, "none: its memory is unknown"
    each = device_estimate.share_bytes(dataclasses.replace(run, gpu_share=1))
    left = room.device_room(run, vram_gib) // each
    if left < embedding:
        return 0, f"none: {_gib(max(left, 0) * each)} of VRAM are left, the embedding's takes {_gib(embedding * each)}"
    return _front(run.config, wanted, left, "the rest's update is hidden")


def relieve(run: Selection, vram_gib: Callable[[Config], float | None]) -> Selection:
    """The run with a larger share where host memory would not hold the rest: the smallest that lets it, as far as VRAM allows."""
    config = run.config
    short, size = room.host_shortage(run), vram_gib(config)
    if config.offload.gpu_share is not None or _obstacle(run) or not short or size is None:
        return run
    embedding, layer, _ = _sizes(config)
    needed = run.gpu_share + short / (parameter_counts.state_bytes(config) * config.launch.ranks_per_host)
    each = device_estimate.share_bytes(dataclasses.replace(run, gpu_share=1))
    possible = run.gpu_share + room.device_room(run, size) // each
    if possible < embedding:
        return run
    wanted = min(config.model.num_layers, max(0, math.ceil((needed - embedding) / layer)))
    return _with(run, *_front(config, wanted, possible, "host memory suffices"))


def _front(config: Config, wanted: int, possible: int, why: str) -> tuple[int, str]:
    """The embedding and `wanted` layers, or as many as `possible` elements hold: elements, and why."""
    embedding, layer, whole = _sizes(config)
    most = config.model.num_layers
    layers = min(wanted, (possible - embedding) // layer)
    far = "" if layers == wanted else f", as far as VRAM allows ({wanted} would do)"
    elements = whole if layers == most else embedding + layers * layer
    return elements, f"the embedding and {layers} of {most} layers, so that {why}{far}"


def _layers_that_hide(config: Config, embedding: int, layer: int) -> int | str:
    """The fewest layers at the front whose update on the GPU lets every later one be updated and fetched before its forward pass;
    as text, what is not known.

    All layers take the same time: f forward, u to update, c to fetch. With s layers on the GPU, layer i (from 0) is updated and
    fetched after (i + 1 - s) u + c, and computed from i f on. This is tightest at the first layer after the share or at the last,
    or at an output projection of its own.
    """
    known, forward_s = _bandwidths(config), _forward_s(config)
    if forward_s is None:
        return f"the GPU's peak is unknown (set {KEY} to choose it)"
    if known is None:
        return "the host's bandwidth is unknown (measure it with python -m ldft.bench nodes)"
    ranks, count = config.launch.ranks_per_host, config.model.num_layers
    traffic = 2 * (parameter_counts.state_bytes(config) + parameter_counts.width(config))
    update_s = layer * traffic / (_BESIDE * sum(known.cpu.values()) / ranks)
    fetch_s = layer * parameter_counts.width(config) / known.link_h2d
    output = 0.0 if config.model.tie_word_embeddings else embedding / layer  # its size in layers
    for share in range(count):
        ready = [(i, (i + 1 - share) * update_s + fetch_s) for i in (share, count - 1)]
        ready.append((count, (count - share + output) * update_s + output * fetch_s))
        if all(seconds <= i * forward_s for i, seconds in ready):
            return share
    return count


def larger(run: Selection) -> list[int]:
    """Elements of each share that is larger than the run's; none where there can be no share."""
    if _obstacle(run):
        return []
    embedding, layer, whole = _sizes(run.config)
    shares = [embedding + layers * layer for layers in range(run.config.model.num_layers)]
    return [share for share in (*shares, whole) if share > run.gpu_share]


def part(run: Selection) -> float:
    """The run's share as a value of the key."""
    return round(run.gpu_share / _sizes(run.config)[2], 3)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _obstacle(run: Selection) -> str:
    config = run.config
    if config.launch.device is not Device.cuda:
        return "there is no GPU to update on (launch.device=cpu)"
    if config.offload.optimizer is not OffloadDevice.cpu or not run.overlap_step:
        return "needs an update beside the next forward pass (optimizer.overlap_step), which does not run here"
    if "sub_group_size" in config.offload.deepspeed.get("zero_optimization", {}) or config.offload.deepspeed_file:
        return (
            "the share is DeepSpeed's first sub-group, but offload.deepspeed or offload.deepspeed_file sets their size"
        )
    if config.model.num_experts:
        return "layers with experts have no share"
    return ""


def _sizes(config: Config) -> tuple[int, int, int]:
    """Elements of one rank in the embedding, in a layer, and in all."""
    model, ranks = config.model, config.launch.num_ranks
    layer = parameter_counts.split(parameter_counts.layer_sizes(model), ranks)
    embedding = -(-parameter_counts.embedding_parameters(model) // ranks)
    return embedding, layer, parameter_counts.split(parameter_counts.parameter_sizes(model), ranks)


def _forward_s(config: Config) -> float | None:
    """Expected seconds of one layer's forward pass; None if the device's peak is unknown. Attention: the causal half."""
    names = environment.gpus()
    peak = device_rates.peak_tflops_per_s(names[0], config.train.precision) if names else None
    if peak is None:
        return None
    model, tokens = config.model, layer_memory.tokens(config)
    attention = 2.0 * config.seq_len.tokens * model.num_attention_heads * model.head_dim
    return tokens * (2.0 * parameter_counts.layer_parameters(model) + attention) / (peak * 1e12 * _REACHED)


def _bandwidths(config: Config) -> Bandwidths | None:
    """As given or as measured on this machine; None if not known."""
    try:
        return bandwidths.bandwidths(config.numa.bandwidth)
    except ConfigError:
        if config.numa.bandwidth:
            raise
        return None  # a damaged profile stops only what cannot do without one
