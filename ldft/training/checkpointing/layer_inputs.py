"""Layer inputs in host memory: copied out during the forward pass, copied back one group ahead of the backward pass.

    forward   compute |  group 0  |  group 1  |  group 2  | loss
              to host |  0        |  1        |             the last inputs stay, at least one: their backward comes first
    backward  compute |  group 2  |  group 1  |  group 0  |
              to device  1        |  0        |

Host memory is one arena, allocated before training and divided into one slot per group, with no rounding; every micro-batch
reuses the slots. Besides the inputs that stay, the device holds at most two: the one in use and the one being copied. The backward
pass alternates between two buffers, allocated at its start and dropped at its end. When a group's input is requested, autograd has
finished the following group (it runs nodes in the reverse order of the forward pass), so that group's buffer receives the input of
the preceding one.

copies.py explains why a buffer or an input is never freed or overwritten too early. A slot belongs to the latest forward pass. An
earlier pass without a backward is discarded; calling its backward later raises an error, and never gives a wrong gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ldft.memory.policy import Placement
from ldft.training.checkpointing.copies import HostSlots, Lane, Lanes, as_bytes


@dataclass(slots=True)
class _Slot:
    """Host memory for one input, with the forward pass that filled it and the input's layout."""

    bytes: torch.Tensor
    forward: int = -1
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.uint8

    @property
    def used(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class _Buffer:
    """Device memory for one input: which input it holds, and the end of the copy into it."""

    bytes: torch.Tensor
    holds: tuple[int, int]
    end: Any
    waited: bool = False


class HostInputs(HostSlots):
    """Keeps the input of every group but the last ones in host memory. Raises HostMemoryError if that memory cannot be allocated.

    groups: layer groups per forward pass. bytes_each: bytes of the largest input. placement: of the memory; None: the process
    policy.
    pin: register the memory, so that copies overlap computation. lanes: None: create new ones. on_device: how many inputs stay,
    from the last.
    """

    def __init__(
        self,
        groups: int,
        bytes_each: int,
        device: torch.device,
        placement: Placement | None = None,
        *,
        pin: bool = False,
        lanes: Lanes | None = None,
        on_device: int = 1,
    ) -> None:
        count = max(groups - on_device, 0)
        what = f"checkpointing.mode: cpu keeps {count} layer inputs"
        less = ", a higher checkpointing.every or checkpointing.device_inputs, or checkpointing=gpu"
        super().__init__(count, bytes_each, device, placement, pin=pin, lanes=lanes, what=what, less=less)
        self._slots = [_Slot(row) for row in self._rows]
        self._buffers: list[_Buffer | None] = [None, None]
        self._leaving: tuple[KeptInput, torch.Tensor, Any] | None = None
        self._forward = 0

    def keep(self, group: int, hidden_states: torch.Tensor) -> KeptInput:
        """Take the input of a group, in the forward pass; groups come in order."""
        self._release_left()
        if group == 0:
            self._forward += 1
            self._drop_buffers()
        # A strided input is copied out through a contiguous copy, which must stay alive until the transfer has ended.
        source = hidden_states.detach() if hidden_states.is_contiguous() else hidden_states.detach().contiguous()
        kept = KeptInput(self, group, self._forward, hidden_states.requires_grad, source._version)
        if group >= len(self._slots):
            kept.stayed = source
            return kept
        slot = self._slots[group]
        slot.shape, slot.dtype = source.shape, source.dtype
        if slot.used > slot.bytes.numel():
            slot.forward = -1
            raise RuntimeError(
                f"checkpointing: an input of {slot.used} bytes came, {slot.bytes.numel()} were expected; "
                "no batch may have more tokens than train.micro_batch_size * seq_len.tokens"
            )
        slot.forward = self._forward
        # Keep the input alive until the compute stream has waited for the copy, or the allocator would reuse its memory.
        self._leaving = kept, source, self._lanes.copy(Lane.to_host, slot.bytes[: slot.used], as_bytes(source))
        return kept

    def _release_left(self) -> None:
        """Release the previous input: its copy had a whole group's time, so waiting for it takes almost no time."""
        if self._leaving:
            kept, source, end = self._leaving
            self._leaving = None
            self._lanes.wait(end)
            kept.check(source)

    def restore(self, kept: KeptInput) -> torch.Tensor:
        """Return the input to the device in the backward pass, and start copying the preceding one."""
        if kept.stayed is None:
            states = self._arrived(kept.group, kept.forward)
        else:
            states = kept.stayed
            kept.check(states)
        if 0 < kept.group <= len(self._slots):
            self._bring(kept.group - 1, kept.forward)
        elif kept.group == 0:
            self._drop_buffers()
        return states.detach().requires_grad_(kept.requires_grad)

    def _arrived(self, group: int, forward: int) -> torch.Tensor:
        buffer = self._bring(group, forward)
        self._lanes.wait(buffer.end)
        buffer.waited = True
        slot = self._slots[group]
        return buffer.bytes[: slot.used].view(slot.dtype).view(slot.shape)

    def _bring(self, group: int, forward: int) -> _Buffer:
        """The buffer that holds this input now or once its copy has ended."""
        slot = self._slots[group]
        if slot.forward != forward:
            raise RuntimeError(
                "checkpointing: this loss is of an earlier forward pass, whose layer inputs a later one has replaced; "
                "call backward before the next forward"
            )
        buffer = self._buffers[group % 2]
        if buffer is None or buffer.bytes.numel() < slot.used:
            # Allocated on the compute stream; the copy starts after any work that stream still does in this memory.
            buffer = _Buffer(torch.empty(slot.used, dtype=torch.uint8, device=self._device), (-1, -1), None)
            self._buffers[group % 2] = buffer
        if buffer.holds != (group, forward):
            buffer.end = self._lanes.copy(Lane.to_device, buffer.bytes[: slot.used], slot.bytes[: slot.used])
            buffer.holds, buffer.waited = (group, forward), False
        return buffer

    def _drop_buffers(self) -> None:
        """Free the buffers. If nobody waited for a buffer's copy (the backward pass failed), wait for it first."""
        for buffer in self._buffers:
            if buffer and not buffer.waited:
                self._lanes.wait(buffer.end)
        self._buffers = [None, None]


@dataclass(slots=True)
class KeptInput:
    """One kept input."""

    owner: HostInputs
    group: int
    forward: int
    requires_grad: bool
    version: int
    stayed: torch.Tensor | None = None

    def restore(self) -> torch.Tensor:
        return self.owner.restore(self)

    def check(self, input: torch.Tensor) -> None:
        """Raise if the layer has modified its own input: the kept copy may be from before or after."""
        if input._version != self.version:
            raise RuntimeError(
                f"checkpointing: a layer of group {self.group} changes its input in place; use checkpointing=none"
            )
