"""The attributes in which DeepSpeed's parameters and optimizers hold tensors, and a check that this release still has them.

From DeepSpeed 0.19.8 (runtime/zero: stage3.py, stage_1_and_2.py, partition_parameters.py). If a release renames one of them, some
tensors have no role: their memory is not placed, measured or audited. So ldft refuses to run with such a release.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
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
    GRADIENT_VIEWS,
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


def require_known_layout(optimizer: Any) -> None:
    """Raise UnknownLayoutError if an engine's optimizer lacks an attribute that ldft needs."""
    for name in names(optimizer):
        if not hasattr(optimizer, name):
            raise UnknownLayoutError(
                f"DeepSpeed {deepspeed.__version__} has no {type(optimizer).__name__}.{name}, where ldft finds offloaded tensors "
                f"(tested with {TESTED}); install deepspeed==0.19.8, or see docs/upgrading_deepspeed.md"
            )


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The full shape of a parameter, even if ZeRO-3 has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: torch.nn.Parameter) -> int:
    """The full number of elements of a parameter, even if ZeRO-3 has sharded it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
