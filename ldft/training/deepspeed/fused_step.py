"""ZeRO-3's update of offloaded weights in one pass over host memory, within the step or beside the next forward pass.

Stock DeepSpeed widens gradients to fp32 on their way to the host, and makes three passes: multiply gradients by a factor (unscaling
and clipping), CPUAdam, and round weights to 16 bits. They move 8, 28 and 6 bytes per parameter; here a single pass moves 28, and
gradients stay in the precision in which they are accumulated: 2 bytes less than 6 to copy, and 4 less to store. This module
extends DeepSpeed's optimizer class, as DeepSpeed itself does for SuperOffload: it stores the factor instead of applying it, and
HostOptimizer does the rest. The results are the same bit for bit, because widening is exact.

In fp16, stock DeepSpeed also checks for overflow with isinf and isnan over all gradients. The norms of the parameters' gradients,
which it has by then, say the same: a norm in fp64 is finite exactly if all elements are.
"""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from ldft.training.deepspeed import device_share, layout, update_overlap
from ldft.training.deepspeed.fetches import Fetches
from ldft.training.deepspeed.update_overlap import Updates
from ldft.training.optimizers.host_optimizer import Task

log = logging.getLogger(__name__)
_Stock: Any = stage3.DeepSpeedZeroOptimizer_Stage3
# Methods before which an update in progress must end: they read or write weights, gradients or state.
FLUSHING: tuple[str, ...] = (
    "backward_prologue",
    "checkpoint_event_prologue",
    "destroy",
    "state_dict",
    "load_state_dict",
    "load_hp_checkpoint_state_from_checkpoint_dir_stage3",
    "refresh_fp32_params",
    "offload_states",
    "reload_states",
    "get_fp32_grad_partitions",
    "_get_fp32_grad_state_partition",
    "_get_fp32_opt_state_partition",
    "update_fp32_grad_for_param_vectorized",
)
# Methods that are overridden, and names that the overrides use. From DeepSpeed 0.19.8.
NEEDED: tuple[str, ...] = (
    "has_overflow",
    "unscale_and_clip_grads",
    "partition_grads",
    "_get_norm_groups",
    "_partition_all_parameters",
    "_optimizer_step",
    "_post_step",
    "_reassign_or_swap_out_partitioned_parameters",
    "_unflatten_partitioned_parameters",
    *FLUSHING,
)


class FusedStage3(_Stock):
    """ZeRO-3 whose `optimizer` is a HostOptimizer, with master weights, gradients and moments in host memory. The `grad` of a
    master weight is its part of `grad_partitions_flat_buffer`, in the precision of that buffer."""

    updates: Updates
    _parameters: list[Any]
    """All parameters of the model, in its order."""
    _tasks: dict[int, Task]
    _gradient_factor = 1.0
    grad_partitions_flat_buffer: torch.Tensor
    norm_for_param_grads: dict[int, Any]
    fp16_groups: list[list[Any]]
    norm_groups: list[list[Any]]
    """Parameters whose norms are summed together: the sub-groups of a run without a share."""

    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copy the reduced gradients of a bucket to the host, or add them there. Stock DeepSpeed copies each by itself, and reads
        it back to compute its norm; here the norm comes from the device's gradient, and neighbours are copied together."""
        views = getattr(self, layout.GRADIENT_VIEWS)
        found = []
        for parameter, gradient in zip(params_to_release, grad_partitions, strict=True):
            if parameter.partition_numel() * self._get_param_partition_rank(parameter) < parameter.ds_numel:
                self._offload_boundary_param_ids.add(parameter.ds_id)
                found.append((parameter, gradient, views[parameter.ds_id].narrow(0, 0, gradient.numel())))
        gradients, kept = [gradient for _, gradient, _ in found], [view for _, _, view in found]
        if self.micro_step_id > 0:
            sums = [view.to(gradient.device, non_blocking=True) for gradient, view in zip(gradients, kept, strict=True)]
            torch._foreach_add_(sums, gradients)
            gradients = sums
        for source, target in merged(gradients, kept):
            target.copy_(source, non_blocking=True)
        if found and self.is_gradient_accumulation_boundary():
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
            names = [self.get_param_id(parameter) for parameter, _, _ in found]
            self.norm_for_param_grads.update(zip(names, norms, strict=True))
        for parameter in params_to_release:
            if parameter.grad is not None and parameter.grad.is_cuda:
                parameter.grad.record_stream(torch.cuda.current_stream(parameter.grad.device))
            parameter.grad = None
        return kept

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
        # Run DeepSpeed's check on the norms only; it shares the result across ranks. A parameter without a norm, since the last
        # micro-batch did not use it, keeps its older gradient: the extremes of that say as much.
        gradients, norms = self.grad_partitions_flat_buffer, self.norm_for_param_grads
        views = getattr(self, layout.GRADIENT_VIEWS)
        rest = [p for group in self.fp16_groups for p in group if self.get_param_id(p) not in norms]
        found = [torch.stack(torch.aminmax(views[p.ds_id])).double() for p in rest if views[p.ds_id].numel()]
        if norms:
            found.append(torch.stack([norm.double().reshape(()) for norm in norms.values()]))
        self.grad_partitions_flat_buffer = torch.cat([part.to(gradients.device) for part in found])
        try:
            return bool(super().has_overflow(partition_gradients))
        finally:
            self.grad_partitions_flat_buffer = gradients

    def _partition_all_parameters(self) -> None:
        # DeepSpeed walks the tree of modules four times for it, which takes longer than the step of small adapters.
        for parameter in self._parameters:
            parameter.ds_active_sub_modules.clear()
        held = [parameter for parameter in self._parameters if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE]
        self.parameter_offload.get_param_coordinator().release_and_reset_all(_Flat(held))

    def _get_norm_groups(self) -> Any:
        # DeepSpeed adds up squares one by one: numbers on the host do so without a kernel for each, to the same sum in fp64. It
        # rounds the norm of each sub-group to fp32: a share makes other sub-groups, but must not change the norm.
        groups, norms = self.fp16_groups, self.norm_for_param_grads
        self.fp16_groups = self.norm_groups
        if norms:
            numbers = torch.stack([norm.reshape(()) for norm in norms.values()]).tolist()
            self.norm_for_param_grads = dict(zip(norms, numbers, strict=True))
        try:
            return super()._get_norm_groups()
        finally:
            self.fp16_groups, self.norm_for_param_grads = groups, norms

    def _optimizer_step(self, sub_group_id: int) -> None:
        weights = self.fp16_partitioned_groups_flat[sub_group_id]
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        parameters = self.fp16_groups[sub_group_id]
        tasks: list[Task] = []
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        # Call `step`, which torch's schedulers wrap. Learning rate, factor and step number are those of now.
        group["params"] = [master]
        self.optimizer.step(
            into=tasks,
            gradient_factor=self._gradient_factor,
            copy=weights if weights.device == master.device else None,
            parts=[parameter.partition_numel() for parameter in parameters] if self.updates.overlap else None,
        )
        group["params"] = []
        self._gradient_factor = 1.0
        if master.is_cuda:  # launched, in the order of the device's work
            self.updates.launched_on(master.device)
        elif self.updates.overlap:
            self._tasks |= {parameter.ds_id: task for parameter, task in zip(parameters, tasks, strict=True)}
        else:
            self.updates.run(tasks)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        if self.fp16_partitioned_groups_flat[sub_group_id].device == master.device:
            self._unflatten_partitioned_parameters(sub_group_id)  # the update writes the weights
        else:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)

    def _post_step(self, *arguments: Any) -> None:
        if self.updates.overlap:
            # What stays on the device is fetched at once, the last layer's norm too.
            kept = {parameter.ds_id for parameter in self.persistent_parameters}
            tasks, self._tasks = self._tasks, {}
            self.updates.start(tasks, kept.__contains__)
        super()._post_step(*arguments)


class _Flat:
    """What DeepSpeed's coordinator needs of a module whose parameters it releases."""

    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters

    def named_parameters(self, recurse: bool) -> list[tuple[str, Any]]:
        return [("", parameter) for parameter in self._parameters]

    def ds_external_parameters(self) -> tuple[()]:
        return ()


def _flushing(name: str) -> Callable[..., Any]:
    def method(self: FusedStage3, *arguments: Any, **named: Any) -> Any:
        self.updates.finish()
        return getattr(super(FusedStage3, self), name)(*arguments, **named)

    method.__name__ = method.__qualname__ = name
    return method


for _name in FLUSHING:
    if hasattr(_Stock, _name):
        setattr(FusedStage3, _name, _flushing(_name))


def merged(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same copies, with neighbours in both memories as one: a pair of flat views each."""
    runs: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for source, target in zip(sources, targets, strict=True):
        source, count = source.reshape(-1), source.numel()
        if runs and source.dtype == target.dtype:
            first, into, so_far = runs[-1]
            if _follows(first, so_far, source) and _follows(into, so_far, target):
                runs[-1] = first, into, so_far + count
                continue
        runs.append((source, target, count))
    return [(source.as_strided((n,), (1,)), target.as_strided((n,), (1,))) for source, target, n in runs]


def _follows(first: torch.Tensor, count: int, tensor: torch.Tensor) -> bool:
    """Whether a tensor begins where `count` elements from the start of another one of the same storage end."""
    same = first.dtype == tensor.dtype and first.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return same and first.storage_offset() + count == tensor.storage_offset()


def missing_names() -> list[str]:
    """Names that the fused step needs and this release of DeepSpeed lacks."""
    return [name for name in NEEDED if not hasattr(_Stock, name)]


def install(engine: Any, *, overlap: bool, share: bool = False) -> None:
    """Install the fused step in an engine built around a HostOptimizer. Under ZeRO-1/2, and in releases with other names,
    DeepSpeed's three passes remain, with HostOptimizer's step as the second.

    share: whether the GPU updates the first sub-group.
    """
    optimizer = engine.optimizer
    if type(optimizer) is not _Stock:
        return
    if missing := missing_names():
        log.warning("DeepSpeed %s has no %s: the update makes three passes", deepspeed.__version__, ", ".join(missing))
        return
    # The overridden methods run only in training and later, so changing the object's class is enough; no DeepSpeed name is patched.
    optimizer.__class__ = FusedStage3
    optimizer.updates = Updates(overlap=overlap, threads=update_overlap.threads_beside())
    optimizer._parameters = list(engine.module.parameters())
    optimizer._tasks = {}
    optimizer.norm_groups = optimizer.fp16_groups
    share_gradients(optimizer)
    if share:
        optimizer.norm_groups = device_share.sub_groups_without(optimizer)
        device_share.move(engine)
    Fetches(optimizer.updates.wait, engine.device).install(engine)
    if overlap:
        # At the end of a process that failed, no thread may work on memory that is being freed.
        finish = weakref.WeakMethod(optimizer.updates.finish)
        atexit.register(lambda: (alive := finish()) and alive())


def share_gradients(optimizer: Any) -> None:
    """Let the `grad` of each master weight be its part of the buffer in which gradients are accumulated."""
    views = getattr(optimizer, layout.GRADIENT_VIEWS)
    for master, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        first = views[parameters[0].ds_id]
        if first.device != master.device:
            continue  # `device_share.move` gives it another one
        part = first.as_strided((master.numel(),), (1,))
        master.grad = None
        master.grad_dtype = part.dtype
        master.grad = part


def updates_of(engine: Any) -> Updates | None:
    """The updates of an engine with the fused step, else None."""
    return getattr(engine.optimizer, "updates", None)
