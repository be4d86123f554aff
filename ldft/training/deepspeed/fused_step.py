"""ZeRO-3's update of what lies in host memory, in one pass.

Stock DeepSpeed makes three: gradients times a factor (unscaling and clipping), CPUAdam, and weights rounded to 16 bits. They move
8, 28 and 6 bytes a parameter; all in one, 30. Here its optimizer class is extended, as DeepSpeed itself does for SuperOffload: the
factor is noted instead of applied, and HostOptimizer does the rest.

In fp16 stock also looks for overflow, by isinf and isnan of all gradients, which make masks of a byte for each: most of a step.
The smallest and the largest gradient tell as much in one pass.
"""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import stage3

log = logging.getLogger(__name__)
_Stock: Any = stage3.DeepSpeedZeroOptimizer_Stage3
# What is overridden, and what the overrides call. Read in DeepSpeed 0.19.8.
NEEDED: tuple[str, ...] = (
    "has_overflow",
    "unscale_and_clip_grads",
    "_optimizer_step",
    "_reassign_or_swap_out_partitioned_parameters",
    "_unflatten_partitioned_parameters",
)


class FusedStage3(_Stock):
    """Its `optimizer` is a HostOptimizer, and all partitions lie in host memory."""

    _gradient_factor = 1.0
    _rounded = False
    grad_partitions_flat_buffer: torch.Tensor

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        # DeepSpeed's own method, on a gradient of one element: what it multiplies with remains.
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
        # DeepSpeed's own method, on the extremes: a number that is none is both, and all ranks hear of it.
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
        # By `step`, which torch's schedules watch.
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
    """Into an engine that was built around a HostOptimizer. Under ZeRO-1/2, and in a release that has other names, DeepSpeed's
    chain of three remains, with HostOptimizer's step as its second."""
    if type(engine.optimizer) is not _Stock:
        return
    missing = [name for name in NEEDED if not hasattr(_Stock, name)]
    if missing:
        log.warning("DeepSpeed %s has no %s: the update makes three passes", deepspeed.__version__, ", ".join(missing))
        return
    # What it overrides runs in steps only, so the object need not be built as one; no name of DeepSpeed's is patched.
    engine.optimizer.__class__ = FusedStage3
