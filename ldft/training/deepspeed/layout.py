"""The attributes of DeepSpeed's parameters and optimizers that ldft reads, and a check that this release still has them.

From DeepSpeed 0.19.8 (runtime/zero: stage3.py, stage_1_and_2.py, partition_parameters.py). If a release renames one of them, some
tensors have no role: their memory is not placed, measured or audited. So ldft refuses to run with such a release: before it builds
a model, where DeepSpeed's code mentions a name no more, and again with the live optimizer.
"""

from __future__ import annotations

import inspect
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ldft.errors import LdftError

TESTED = "0.19.5 to 0.19.8"
# A private attribute, hence the class's name as prefix.
GRADIENT_VIEWS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
# Attributes of ZeRO-3's optimizer: always, with parameters on the host, and with the optimizer on the host.
STAGE_3 = ("offload_param", "offload_optimizer", "fp16_groups", "optimizer")
STAGE_3_PARAMETERS = ("param_groups_fp16_flat_cpu_memory", "fp16_partitioned_groups_flat")
STAGE_3_OPTIMIZER = (
    "fp32_partitioned_groups_flat",
    "subgroup_to_device",
    "grad_partitions_flat_buffer",
    "sub_group_to_group_id",
    GRADIENT_VIEWS,
)
# Attributes of ZeRO-3's optimizer that ldft reads while DeepSpeed builds it.
STAGE_3_BUILDING = (
    "_create_fp16_sub_groups",
    "sub_group_size",
    "dtype",
    "fp16_partitioned_groups_flat_numel",
    "gradient_accumulation_dtype",
    "master_weights_and_grads_dtype",
    "params_in_nvme_and_cpu",
    "partial_offload",
    "swap_optimizer",
    "trainable_param_groups",
)
# What they add to a parameter.
STAGE_1_AND_2_OF_PARAMETERS = ("_hp_mapping",)
STAGE_3_OF_PARAMETERS = (
    "ds_active_sub_modules",
    "ds_id",
    "ds_numel",
    "ds_shape",
    "ds_status",
    "ds_tensor",
    "partition_numel",
)
# Attributes of ZeRO-1/2's optimizer: always, and with the optimizer on the host.
STAGE_1_AND_2 = ("cpu_offload", "single_partition_of_fp32_groups", "bit16_groups", "optimizer")
STAGE_1_AND_2_OPTIMIZER = (
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "param_names",
    "offload_gradient_dict",
    "temp_grad_buffer_for_cpu_offload",
    "accumulated_grads_in_cpu",
    "master_weights_and_grads_dtype",
    "gradient_accumulation_steps",
    "params_in_partition",
    "get_param_id",
)


class UnknownLayoutError(LdftError):
    """This DeepSpeed release lacks an attribute that ldft needs. One line: which one, the tested releases, what to do."""


def is_stage_3(optimizer: Any) -> bool:
    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)


def is_stage_1_or_2(optimizer: Any) -> bool:
    return isinstance(optimizer, DeepSpeedZeroOptimizer)


def names(optimizer: Any) -> tuple[str, ...]:
    """The attributes of an engine's optimizer that ldft needs; none without ZeRO."""
    if is_stage_3(optimizer):
        wanted: tuple[str, ...] = STAGE_3
        wanted += STAGE_3_PARAMETERS if getattr(optimizer, "offload_param", False) else ()
        return wanted + (STAGE_3_OPTIMIZER if getattr(optimizer, "offload_optimizer", False) else ())
    if is_stage_1_or_2(optimizer):
        return STAGE_1_AND_2 + (STAGE_1_AND_2_OPTIMIZER if getattr(optimizer, "cpu_offload", False) else ())
    return ()


def require_known_names(stage: int) -> None:
    """Raise UnknownLayoutError if DeepSpeed's code mentions a name no more that ldft reads at this ZeRO stage."""
    wanted: dict[type, tuple[str, ...]] = {}
    if stage == 3:
        wanted = {Init: STAGE_3_OF_PARAMETERS, DeepSpeedZeroOptimizer_Stage3: STAGE_3 + STAGE_3_BUILDING}
    elif stage:
        wanted = {DeepSpeedZeroOptimizer: STAGE_1_AND_2 + STAGE_1_AND_2_OF_PARAMETERS}
    for owner, names in wanted.items():
        mentioned = _mentioned(owner)
        for name in names:
            if name not in mentioned:
                raise _unknown(owner, name)


def _mentioned(owner: type) -> set[str]:
    """Every name that the methods of a class and of its bases use, and their own names."""
    methods = [inspect.unwrap(method) for base in owner.__mro__ for method in vars(base).values() if callable(method)]
    codes = [method.__code__ for method in methods if inspect.isfunction(method)]
    return set(dir(owner)).union(*(code.co_names for code in codes))


def _unknown(owner: type, name: str) -> UnknownLayoutError:
    return UnknownLayoutError(
        f"DeepSpeed {deepspeed.__version__} has no {owner.__name__}.{name}, where ldft finds offloaded tensors "
        f"(tested with {TESTED}); install deepspeed==0.19.8, or see docs/upgrading_deepspeed.md"
    )


def require_known_layout(optimizer: Any) -> None:
    """Raise UnknownLayoutError if an engine's optimizer lacks an attribute that ldft needs."""
    for name in names(optimizer):
        if not hasattr(optimizer, name):
            raise _unknown(type(optimizer), name)


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The full shape of a parameter, even if ZeRO-3 has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: torch.nn.Parameter) -> int:
    """The full number of elements of a parameter, even if ZeRO-3 has sharded it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
