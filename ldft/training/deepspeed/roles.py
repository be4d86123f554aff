"""The role of each tensor of a DeepSpeed engine in host memory. Only this module knows where DeepSpeed keeps them.

From DeepSpeed 0.19.8 (runtime/zero/stage3.py, stage_1_and_2.py, ops/adam/cpu_adam.py, ops/lion/cpu_lion.py); the names have been
the same since 0.9.5. An owner is a tensor with its own memory; a view is another tensor object over the same memory, which must
follow when the owner moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.lion import DeepSpeedCPULion

from ldft.training.deepspeed import layout

# Accessed by the device's copy engines; the optimizer's own tensors are not. (Stock DeepSpeed's ZeRO-1/2 also pin master weights,
# but copy them through a 16-bit buffer.)
DMA_ROLES = ("compute_weights", "master_gradients", "compute_gradients", "activations")
# The optimizers' moments by their own names. Lion's second moment, which stock DeepSpeed allocates, is never used.
MOMENTS = {"exp_avg": "momentum", "exp_avg_sq": "variance"}
_MOMENTS_OF = {
    DeepSpeedCPUAdam: ("exp_avg", "exp_avg_sq"),
    DeepSpeedCPULion: ("exp_avg",),
}  # ldft's optimizers list their own
ACCUMULATED = "grad_partitions_flat_buffer"


def flat_name(group: int) -> str:
    """ZeRO-3's 16-bit weights of a group of parameters."""
    return f"param_groups_fp16_flat_cpu_memory[{group}]"


def master_name(sub_group: int) -> str:
    """ZeRO-3's fp32 weights of a sub-group."""
    return f"fp32_partitioned_groups_flat[{sub_group}]"


def accumulated_name(parameter: int) -> str:
    """ZeRO-1/2's gradient of one parameter, kept between micro-steps."""
    return f"accumulated_grads_in_cpu[{parameter}]"


def gradient_name(sub_group: int) -> str:
    return f"{master_name(sub_group)}.grad"


@dataclass(frozen=True, slots=True)
class RoleTensor:
    """A tensor of the live engine, with DeepSpeed's own name for it."""

    role: str
    name: str
    tensor: torch.Tensor
    owner: bool = True
    """False: a view of an owner of the same role."""


def tensors(engine: Any) -> Iterator[RoleTensor]:
    """Every tensor in host memory with a role, owners before their views."""
    optimizer = engine.optimizer
    if layout.is_stage_3(optimizer):
        every = _stage_3(engine.module, optimizer)
        yield from (item for item in every if item.tensor.device.type == "cpu")
    elif layout.is_stage_1_or_2(optimizer) and optimizer.cpu_offload:
        yield from _stage_1_and_2(optimizer)


def moments_of(optimizer: Any) -> tuple[str, ...]:
    """Names of the moments that a CPU optimizer uses; empty for an unknown optimizer."""
    return getattr(optimizer, "moments", _MOMENTS_OF.get(type(optimizer), ()))


def moment_type(optimizer: Any, master: torch.Tensor) -> torch.dtype:
    """The dtype of the optimizer's moments for a master weight."""
    return torch.float32 if optimizer.fp32_optimizer_states else master.dtype


def shares_gradients(optimizer: Any) -> bool:
    """Whether the gradients of the master weights are parts of the gradients in compute precision (fused_step.py)."""
    return hasattr(optimizer, "updates")


def missing_gradients(optimizer: Any) -> dict[int, tuple[int, torch.dtype]]:
    """Parameter number -> (elements, dtype) of the host buffers in which ZeRO-1/2 will accumulate gradients."""
    if not hasattr(optimizer, "accumulated_grads_in_cpu") or optimizer.gradient_accumulation_steps == 1:
        return {}
    if optimizer.master_weights_and_grads_dtype != torch.float32:
        return {}  # views of the master gradients
    # Releases with this attribute keep gradients on the device if they accumulate in fp32.
    on_device = getattr(optimizer, "_use_compact_grad_partition_buffer", lambda group: False)
    return {
        optimizer.get_param_id(parameter): (parameter.numel(), parameter.dtype)
        for group, parameters in enumerate(optimizer.params_in_partition)
        if not on_device(group)
        for parameter in parameters
        if optimizer.get_param_id(parameter) not in optimizer.accumulated_grads_in_cpu
    }


def _stage_3(module: torch.nn.Module, optimizer: Any) -> Iterator[RoleTensor]:
    if optimizer.offload_param:
        flats = optimizer.param_groups_fp16_flat_cpu_memory
        yield from (RoleTensor("compute_weights", flat_name(i), flat) for i, flat in enumerate(flats))
        trained = {id(parameter) for group in optimizer.fp16_groups for parameter in group}
        for name, parameter in module.named_parameters():
            if hasattr(parameter, "ds_tensor") and parameter.ds_tensor.device.type == "cpu":
                # A frozen parameter's shard has its own memory.
                owner = id(parameter) not in trained
                yield RoleTensor("compute_weights", f"{name}.ds_tensor", parameter.ds_tensor, owner)
        for i, part in enumerate(optimizer.fp16_partitioned_groups_flat):
            yield RoleTensor("compute_weights", f"fp16_partitioned_groups_flat[{i}]", part, owner=False)
    if not optimizer.offload_optimizer:
        return
    for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        if optimizer.subgroup_to_device[i] == "cpu":
            yield from _updated(optimizer, master_name(i), master)
    yield RoleTensor("compute_gradients", ACCUMULATED, optimizer.grad_partitions_flat_buffer)
    if shares_gradients(optimizer):
        for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield RoleTensor("compute_gradients", gradient_name(i), master.grad, owner=False)
    for i, part in getattr(optimizer, layout.GRADIENT_VIEWS, {}).items():
        yield RoleTensor("compute_gradients", f"param_id_to_grad_partition[{i}]", part, owner=False)


def _stage_1_and_2(optimizer: Any) -> Iterator[RoleTensor]:
    for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
        yield from _updated(optimizer, f"single_partition_of_fp32_groups[{i}]", master)
        staging = optimizer.param_buffer_of_bit16_for_cpu_offload_groups[i]
        yield RoleTensor("compute_weights", f"param_buffer_of_bit16_for_cpu_offload_groups[{i}]", staging)
        for parameter in optimizer.bit16_groups[i]:
            mapping = parameter._hp_mapping
            name = optimizer.param_names[parameter]
            if mapping is not None:
                yield RoleTensor("master_weights", f"{name}.hp_fragment", mapping.hp_fragment, owner=False)
                for key, part in (mapping.optim_fragment or {}).items():
                    if key in MOMENTS:
                        yield RoleTensor(MOMENTS[key], f"{name}.optim_fragment.{key}", part, owner=False)
        for k, part in enumerate(optimizer.offload_gradient_dict.get(i) or ()):
            yield RoleTensor("master_gradients", f"offload_gradient_dict[{i}][{k}]", part, owner=False)
    yield RoleTensor(
        "compute_gradients", "temp_grad_buffer_for_cpu_offload", optimizer.temp_grad_buffer_for_cpu_offload
    )
    for i, gradient in optimizer.accumulated_grads_in_cpu.items():
        if optimizer.master_weights_and_grads_dtype == torch.float32:  # else it is a view of the master gradient
            yield RoleTensor("compute_gradients", accumulated_name(i), gradient)


def _updated(optimizer: Any, name: str, master: torch.Tensor) -> Iterator[RoleTensor]:
    """A partition that the optimizer updates, its gradient and its moments."""
    yield RoleTensor("master_weights", name, master)
    if master.grad is not None and not shares_gradients(optimizer):
        yield RoleTensor("master_gradients", f"{name}.grad", master.grad)
    state = optimizer.optimizer.state.get(master, {})
    for key, role in MOMENTS.items():
        if key in state:
            yield RoleTensor(role, f"{name}.{key}", state[key])
