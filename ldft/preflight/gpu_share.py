"""Chooses how much of the optimizer's state lives on the GPU although it is offloaded. Imports no torch.

An update beside the next forward pass (optimizer.overlap_step) cannot hide what that pass needs first, the embedding, nor what
takes longer than the pass. So the front of the model, in the order of the forward pass, can be updated on the GPU: the embedding
and some whole layers. Their master weights and moments, and their weights and gradients in compute precision, are in device
memory; a kernel rounds as the CPU's does, so no loss changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from ldft import environment
from ldft.config import Config, Device, OffloadDevice
from ldft.errors import CombinationError, ConfigError
from ldft.memory import bandwidths
from ldft.preflight import device_estimate, device_rates, parameter_counts
from ldft.preflight.selection import Selection

KEY = "offload.gpu_share"
# Of a datasheet's peak, the forward pass of a model reaches this at most: 0.53 was measured on an H100 (3B, 32768 tokens, cuDNN). A
# higher value means a shorter forward pass, and so a larger share.
_REACHED = 0.55
# Of its rate alone, the update keeps this beside the forward pass and its copies (0.90 measured on an H100's host).
_BESIDE = 0.9
# Of the GPU's memory, this stays free: estimates are a few percent off.
_SPARE = 0.08


def settle(run: Selection, vram_gib: Callable[[Config], float | None]) -> Selection:
    """The run with its share. vram_gib: memory of each GPU, None if unknown. Raises CombinationError for a share that is not
    possible."""
    elements, why = _choose(run, vram_gib)
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
        return embedding + layers * layer, f"as requested: the embedding and {layers} layers"
    return _hiding(run, vram_gib(config), embedding, layer, whole)


def _hiding(run: Selection, vram_gib: float | None, embedding: int, layer: int, whole: int) -> tuple[int, str]:
    """The smallest share that hides the rest of the update."""
    config = run.config
    forward_s = _forward_s(config)
    rate = _host_rate(config)
    if forward_s is None or rate is None or vram_gib is None:
        missing = "the GPU's peak" if forward_s is None else "the host's bandwidth" if rate is None else "its memory"
        return 0, f"none: {missing} is unknown ({_advice(forward_s, rate)})"
    each = device_estimate.share_bytes(dataclasses.replace(run, gpu_share=1))
    peak = sum(device_estimate.peak_of(device_estimate.moments(run)).values())
    need = peak * (1 + device_estimate.FRAGMENTATION) + device_estimate.CONTEXT
    room = int((vram_gib * 2**30 * (1 - _SPARE) - need) / each)
    if room < embedding:
        return 0, f"none: {_gib(max(room, 0) * each)} of VRAM are left, the embedding's takes {_gib(embedding * each)}"
    traffic = 2 * 4 * (2 if config.optimizer.name == "lion" else 3) + 2 * parameter_counts.width(config)
    hidden = int(forward_s * rate / traffic)  # elements updated during the forward pass
    wanted = max(0, math.ceil((whole - embedding - hidden) / layer))
    layers = min(wanted, config.model.num_layers, (room - embedding) // layer)
    elements = embedding + layers * layer
    rest_s = (whole - elements) * traffic / rate
    said = f"the embedding and {layers} layers, so that the rest's update, expected {rest_s:.2f} s"
    if layers < wanted:
        return elements, f"{said}, is as short as VRAM allows (forward pass {forward_s:.2f} s)"
    return elements, f"{said}, fits beside a forward pass of {forward_s:.2f} s"


def _advice(forward_s: float | None, rate: float | None) -> str:
    if forward_s is not None and rate is None:
        return "measure it with python -m ldft.bench nodes"
    return f"set {KEY} to choose it"


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
    """Expected seconds of one forward pass; None if the device's peak is unknown. Attention: the causal half."""
    names = environment.gpus()
    peak = device_rates.peak_tflops_per_s(names[0], config.train.precision) if names else None
    if peak is None:
        return None
    model, tokens = config.model, device_estimate.tokens(config)
    weights = parameter_counts.num_parameters(model)
    if not model.tie_word_embeddings:
        weights -= parameter_counts.embedding_parameters(model)
    attention = 2.0 * config.seq_len.tokens * model.num_attention_heads * model.head_dim * model.num_layers
    return tokens * (2.0 * weights + attention) / (peak * 1e12 * _REACHED)


def _host_rate(config: Config) -> float | None:
    """Bytes per second of one rank's update beside the forward pass; None if not known."""
    try:
        known = bandwidths.bandwidths(config.numa.bandwidth)
    except ConfigError:
        if config.numa.bandwidth:
            raise
        return None  # a damaged profile stops only what cannot do without one
    return None if known is None else _BESIDE * sum(known.cpu.values()) / config.launch.num_ranks
