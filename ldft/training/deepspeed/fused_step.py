"""ZeRO-3's update of offloaded weights in one pass over host memory.

Stock DeepSpeed makes three: multiply gradients by a factor (unscaling and clipping), CPUAdam, and round weights to 16 bits. They
move 8, 28 and 6 bytes per parameter; a single pass moves 30. This module extends DeepSpeed's optimizer class, as DeepSpeed itself
does for SuperOffload: it stores the factor instead of applying it, and HostOptimizer does the rest.

In fp16, stock DeepSpeed also checks for overflow with isinf and isnan over all gradients, which write a mask byte for each: most of
the step's time. The minimum and maximum gradient give the same information in one pass.
"""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import stage3

log = logging.getLogger(__name__)
_Stock: Any = stage3.DeepSpeedZeroOptimizer_Stage3
# Methods that are overridden, and names that the overrides use. From DeepSpeed 0.19.8.
NEEDED: tuple[str, ...] = (
    "has_overflow",
    "unscale_and_clip_grads",
    "_optimizer_step",
    "_reassign_or_swap_out_partitioned_parameters",
    "_unflatten_partitioned_parameters",
)


class FusedStage3(_Stock):
    """ZeRO-3 whose `optimizer` is a HostOptimizer, with all partitions in host memory."""

    _gradient_factor = 1.0
    _rounded = False
    grad_partitions_flat_buffer: torch.Tensor

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        # Run DeepSpeed's own method on a gradient with the single element 1: the result is its factor.
        masters = self.fp32_partitioned_groups_flat
        stand_in = torch.zeros(1)
        stand_in.grad = torch.ones(1)
        master, masters[sub_group_id] = masters[sub_group_id], stand_in
        try:
            super().unscale_and_clip_grads(sub_group_id, total_norm)
        finally:
            masters[sub_group_id] = master
        self._gradient_factor = stand_in.grad.item()

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        # Run DeepSpeed's check on the minimum and maximum only: a NaN shows in both, and DeepSpeed shares the result across ranks.
        gradients = self.grad_partitions_flat_buffer
        self.grad_partitions_flat_buffer = torch.stack(torch.aminmax(gradients))
        try:
            return bool(super().has_overflow(partition_gradients))
        finally:
            self.grad_partitions_flat_buffer = gradients

    def _optimizer_step(self, sub_group_id: int) -> None:
        weights = self.fp16_partitioned_groups_flat[sub_group_id]
        self._rounded = weights.device.type == "cpu" and weights.dtype == torch.bfloat16
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        # Call `step`, which torch's schedulers wrap.
        group["params"] = [master]
        self.optimizer.step(gradient_factor=self._gradient_factor, rounded=weights if self._rounded else None)
        group["params"] = []
        self._gradient_factor = 1.0

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        if self._rounded:
            self._unflatten_partitioned_parameters(sub_group_id)
        else:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)


def install(engine: Any) -> None:
    """Install the fused step in an engine built around a HostOptimizer. Under ZeRO-1/2, and in releases with other names,
    DeepSpeed's three passes remain, with HostOptimizer's step as the second."""
    if type(engine.optimizer) is not _Stock:
        return
    missing = [name for name in NEEDED if not hasattr(_Stock, name)]
    if missing:
        log.warning("DeepSpeed %s has no %s: the update makes three passes", deepspeed.__version__, ", ".join(missing))
        return
    # The overridden methods run only in steps, so changing the object's class is enough; no DeepSpeed name is patched.
    engine.optimizer.__class__ = FusedStage3
