"""Fetches of ZeRO-3's weights from host memory: each waits for the weights' update, and the host does not wait for the copies.

DeepSpeed reads weights through two functions of each parameter (partition_parameters.py, _convert_to_deepspeed_param). On one rank
it lets the host wait until each copy has ended, and on any number of ranks for all but the last two fetched weights
(partitioned_param_coordinator.py, __max_ongoing_fetch_events): meanwhile nothing is launched, and short layers leave the device
idle. The device's streams already order copies and computation, so here the host runs ahead, by a few fetches: what it has fetched
takes device memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import NoGatherCoalescedHandle, NoGatherHandle, ZeroParamStatus

# Fetches that the host may be ahead of the device's computation.
AHEAD = 2
# A private attribute of DeepSpeed's coordinator, hence the class's name as prefix.
_THEIR_LIMIT = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"


class _Ordered:
    """The handle of copies on one rank, without a wait of the host: `fetch_sub_module` lets the device's computation wait for the
    stream of the copies."""

    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters

    def wait(self, **named: Any) -> None:
        for parameter in self._parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._parameters = []


class Fetches:
    """The fetches of one rank's engine."""

    def __init__(self, before: Callable[[Iterable[Any]], None], device: torch.device) -> None:
        """before: called with the parameters before they are read."""
        self._before = before
        # DeepSpeed calls from the stream of its copies.
        self._computation = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._begun: deque[Any] = deque()

    def install(self, engine: Any) -> None:
        for parameter in engine.module.parameters():
            self._watch(parameter)
        coordinator = engine.optimizer.parameter_offload.param_coordinator
        if self._computation is not None and hasattr(coordinator, _THEIR_LIMIT):
            setattr(coordinator, _THEIR_LIMIT, 1 << 30)  # `_keep_near` limits them

    def _watch(self, parameter: Any) -> None:
        gather, coalesced = parameter.all_gather, parameter.all_gather_coalesced

        def all_gather(param_list: Any = None, *arguments: Any, **named: Any) -> Any:
            self._before([parameter] if param_list is None else param_list)
            return gather(param_list, *arguments, **named)

        def all_gather_coalesced(params: Iterable[Any], *arguments: Any, **named: Any) -> Any:
            params = list(params)
            self._before(params)
            if self._computation is None:
                return coalesced(params, *arguments, **named)
            self._keep_near()
            handle = coalesced(params, *arguments, **named)
            return _Ordered(params) if isinstance(handle, (NoGatherHandle, NoGatherCoalescedHandle)) else handle

        parameter.all_gather, parameter.all_gather_coalesced = all_gather, all_gather_coalesced

    def _keep_near(self) -> None:
        """Wait until the device has computed what was launched before the fetch that is AHEAD fetches ago."""
        event = torch.cuda.Event()
        event.record(self._computation)
        self._begun.append(event)
        if len(self._begun) > AHEAD:
            self._begun.popleft().synchronize()
