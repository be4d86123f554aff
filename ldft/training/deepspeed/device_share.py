"""The share of an offloaded model that the GPU updates: DeepSpeed's first sub-group, whose tensors move to the device.

DeepSpeed reads them wherever they are: a fetch of a weight that is on the device already copies nothing, and gradients, checkpoints
and DeepSpeed's own functions follow the tensors' device. Host memory keeps the places of its weights and gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from ldft.preflight import zero_buckets
from ldft.training.deepspeed import layout

SUB_GROUP = 0


def sub_groups_without(optimizer: Any) -> list[list[torch.nn.Parameter]]:
    """The sub-groups that DeepSpeed would make without a share."""
    size = optimizer.sub_group_size
    optimizer.sub_group_size = zero_buckets.DEFAULTS["sub_group_size"]
    try:
        of_groups = [optimizer._create_fp16_sub_groups(group["params"]) for group in optimizer.trainable_param_groups]
    finally:
        optimizer.sub_group_size = size
    return [sub_group for groups in of_groups for sub_group in groups]


@torch.no_grad()
def move(engine: Any) -> None:
    """Move the sub-group's master weights, moments, weights and gradients to the engine's device. Call it after
    `share_gradients`, before moments exist."""
    optimizer, device = engine.optimizer, engine.device
    master = optimizer.fp32_partitioned_groups_flat[SUB_GROUP]
    master.grad = None
    master.data = master.data.to(device)
    optimizer.subgroup_to_device[SUB_GROUP] = device.type
    weights = optimizer.fp16_partitioned_groups_flat[SUB_GROUP]
    optimizer.fp16_partitioned_groups_flat[SUB_GROUP] = weights.to(device)
    optimizer._unflatten_partitioned_parameters(SUB_GROUP)
    gradient = torch.zeros(master.shape, dtype=optimizer.grad_partitions_flat_buffer.dtype, device=device)
    master.grad_dtype = gradient.dtype
    master.grad = gradient
    views, start = getattr(optimizer, layout.GRADIENT_VIEWS), 0
    for parameter in optimizer.fp16_groups[SUB_GROUP]:
        views[parameter.ds_id] = gradient.narrow(0, start, parameter.partition_numel())
        start += parameter.partition_numel()
    state = optimizer.optimizer.state[master]
    state["step"] = 0
    for name in optimizer.optimizer.moments:
        state[name] = torch.zeros_like(master)
