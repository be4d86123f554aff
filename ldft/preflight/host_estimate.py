"""Expected bytes in host memory by formula, before anything runs. Imports no torch. For VRAM see device_estimate.py.

Memory that DeepSpeed (0.19, from its source) keeps for each trained parameter that a rank holds, with the optimizer on the
host:

    master_weights                      4 B, fp32
    master_gradients                    4 B, fp32; with ldft's fused step under ZeRO-3 none: it reads compute_gradients
    momentum, variance                  4 B each, fp32; Lion has no variance
    compute_gradients                   ZeRO-3: in compute precision, also with one accumulation step
                                        ZeRO-2: one largest parameter, and with accumulation every parameter that the rank
                                        has a part of, whole: its share and, at most about, another largest one
    compute_weights                     ZeRO-3 with parameters on the host: in compute precision, frozen ones too
                                        ZeRO-2: the updated weights on their way to the device

Of the share that the GPU updates (gpu_share.py), master weights and moments are not in host memory; the places of its weights and
gradients stay there.

ZeRO-3 pads each parameter to a multiple of the ranks; ZeRO-1 and 2 pad all of them together to a multiple of twice the ranks.
Sub-groups are not padded.
"""

from __future__ import annotations

from ldft.config import Config, Device, OffloadDevice, Precision
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.preflight import deepspeed_config, device_estimate, layer_memory, parameter_counts
from ldft.preflight.selection import Selection

# Interpreter, libraries and, on CUDA, its context, without file pages: measured peaks of runs with few tensors
# (1.47 to 1.53 GiB in the rows in benchmarks/results and multirun_analysis/data; 0.33 to 0.41 GiB without a GPU).
_PROCESS = {Device.cuda: int(1.5 * 2**30), Device.cpu: int(0.36 * 2**30)}
# What of it on CUDA comes with the first iteration (rows of shares of 16 to 105 GiB in multirun_analysis/data: 0.50 to 0.51 GiB).
_LOADED_LATER = int(0.5 * 2**30)


def host_bytes(run: Selection) -> dict[str, int]:
    """Bytes of one rank in host memory by role, the same for every rank; roles that stay on the device are left out."""
    config = run.config
    offload, ranks = config.offload, config.launch.num_ranks
    width = parameter_counts.width(config)
    trained, frozen = parameter_counts.trained_sizes(config), parameter_counts.frozen_sizes(config)
    roles: dict[str, int] = {}
    if offload.optimizer is OffloadDevice.cpu:
        if offload.stage == 3:
            share = parameter_counts.split(trained, ranks)
            roles["compute_gradients"] = width * share
        else:
            whole = parameter_counts.total(trained)
            share = -(-whole // (2 * ranks)) * 2
            accumulates = config.train.gradient_accumulation_steps > 1
            waiting = min(whole, share + max(trained)) if accumulates else 0
            roles["compute_gradients"] = width * (max(trained) + waiting)
            roles["compute_weights"] = width * share
        share -= run.gpu_share
        roles |= {name: 4 * share for name in ("master_weights", "master_gradients", "momentum", "variance")}
        if config.optimizer.name == "lion":
            del roles["variance"]
        if run.shares_gradients:
            del roles["master_gradients"]
    elif offload.optimizer is OffloadDevice.nvme:
        roles["compute_gradients"] = width * parameter_counts.split(trained, ranks)
    if offload.parameters is OffloadDevice.cpu:
        roles["compute_weights"] = width * (
            parameter_counts.split(trained, ranks) + parameter_counts.split(frozen, ranks)
        )
    if waiting := checkpoint_bytes(config, run.device_inputs):
        roles["activations"] = waiting
    return roles


def layer_input_bytes(config: Config) -> int:
    """Bytes of one decoder layer's input for one micro-batch."""
    return layer_memory.hidden_bytes(config)


def attention_output_bytes(config: Config) -> int:
    """Bytes that attention returns in one decoder layer for one micro-batch."""
    return layer_memory.attention_bytes(config)


def checkpoint_bytes(config: Config, device_inputs: int = 1) -> int:
    """Bytes kept in one rank's host memory for the backward pass: the inputs of all layer groups but the last `device_inputs`, and
    the attention outputs of all layers in all groups but the last."""
    settings = config.checkpointing
    groups = settings.groups(config.model.num_layers)
    inputs = max(groups - device_inputs, 0) if settings.mode is CheckpointingMode.cpu else 0
    outputs = max(groups - 1, 0) * settings.every if settings.keep_attention is KeepAttention.host else 0
    return inputs * layer_memory.hidden_bytes(config) + outputs * layer_memory.attention_bytes(config)


def other_bytes(run: Selection, device: device_estimate.Parts) -> dict[str, int]:
    """Bytes of one rank in host memory besides the roles, by purpose. device: the device estimate at its peak."""
    config = run.config
    parts = {"process": _PROCESS[config.launch.device]}
    if deepspeed_config.pins(config) and config.offload.optimizer is OffloadDevice.cpu:
        parts["torch's pinned allocator"] = _rounding(run)
    if run.gpu_share:
        # DeepSpeed builds all master weights in host memory; the GPU's share leaves before the moments of the others are allocated,
        # and before the first iteration loads what makes a process larger.
        rest = parameter_counts.split(parameter_counts.trained_sizes(config), config.launch.num_ranks) - run.gpu_share
        moments = (parameter_counts.state_bytes(config) - 4) * rest
        parts["the share's master weights at the start"] = max(0, 4 * run.gpu_share - moments - _LOADED_LATER)
    if OffloadDevice.nvme in (config.offload.parameters, config.offload.optimizer):
        parts["swap buffers"] = _swap_buffers(run)
    if (
        config.train.precision is Precision.fp16
        and "compute_gradients" in host_bytes(run)
        and config.offload.stage == 3
        and not run.fused_step
    ):
        # DeepSpeed's update checks all gradients for infinities at once: it stores their magnitudes, 2 B each, and flags, 1 B each.
        trained = parameter_counts.trained_sizes(config)
        parts["overflow check"] = 3 * parameter_counts.split(trained, config.launch.num_ranks)
    if config.launch.device is Device.cpu:
        parts["device part"] = sum(device.values())
    return parts


def _swap_buffers(run: Selection) -> int:
    """Host staging buffers for NVMe swapping: buffer_count per weight, buffer_count per fp32 sub-group, and one for its
    gradients."""
    config, zero = run.config, run.zero
    parameters, optimizer, size = zero["offload_param"], zero["offload_optimizer"], 0
    if config.offload.parameters is OffloadDevice.nvme:
        width = parameter_counts.width(config)
        size += width * parameters["buffer_count"] * parameters["buffer_size"]
    if config.offload.optimizer is OffloadDevice.nvme:
        # A sub-group takes parameters until it reaches its size, at least one.
        largest = -(-max(parameter_counts.trained_sizes(config)) // config.launch.num_ranks)
        size += 4 * (optimizer["buffer_count"] + 1) * max(largest, *_sub_groups(config, zero["sub_group_size"]))
    return size


def _rounding(run: Selection) -> int:
    """Bytes that torch's pinned allocator adds: it rounds each block up to a power of two, and the weights, pinned one by one
    before DeepSpeed moves them into one block, stay in its cache."""
    config, zero = run.config, run.zero
    roles, ranks = host_bytes(run), config.launch.num_ranks
    width = parameter_counts.width(config)
    blocks = [roles["compute_gradients"], roles.get("compute_weights", 0)]
    if not run.shares_gradients:
        blocks += [4 * part for part in _sub_groups(config, zero.get("sub_group_size", 1 << 62))]
    added = sum(_power_of_two(block) - block for block in blocks)
    if config.offload.parameters is OffloadDevice.cpu:
        sizes = parameter_counts.trained_sizes(config) + parameter_counts.frozen_sizes(config)
        added += sum(_power_of_two(width * -(-size // ranks)) * count for size, count in sizes.items())
    return added


def _sub_groups(config: Config, size: int) -> list[int]:
    """Elements of each of DeepSpeed's sub-groups, which take parameters until they reach `size`; approximate, as order is
    ignored."""
    share = parameter_counts.split(parameter_counts.trained_sizes(config), config.launch.num_ranks)
    if config.offload.stage < 3 or size >= share:
        return [share]
    if size == 0:
        sizes = parameter_counts.trained_sizes(config).elements()
        return [-(-one // config.launch.num_ranks) for one in sizes]
    whole = share // size
    return [size] * whole + ([share - whole * size] if share > whole * size else [])


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 0 else 0
