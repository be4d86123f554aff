"""Layer inputs that wait in host memory: out while the forward pass goes on, back one ahead of the backward pass.

    forward   compute |  group 0  |  group 1  |  group 2  | loss
              to host |  0        |  1        |             the last input stays: its backward comes first
    backward  compute |  group 2  |  group 1  |  group 0  |
              to device  1        |  0        |

Host memory is one arena, made before training and cut into a slot a group, in exact bytes; the same slots serve every
micro-batch. On the device at most two inputs exist at any time: the one in use and the one on its way. For that, backward
alternates between two buffers, made at its start and dropped at its end. When the input of a group is asked for, autograd has
finished with the group after it (it runs nodes in the reverse order of the forward pass), so its buffer takes the group before.

Why a buffer or an input is never freed or overwritten too early: see copies.py. A slot belongs to the latest forward pass. An
earlier one that never had its backward is forgotten; to run it after all is an error, not a wrong gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ldft.memory.policy import Placement
from ldft.training.checkpointing.copies import Lane, Lanes, arenas, as_bytes, lanes_of


@dataclass(slots=True)
class _Slot:
    """Room for one input in host memory, and which forward pass filled it, with what."""

    bytes: torch.Tensor
    forward: int = -1
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.uint8

    @property
    def used(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class _Buffer:
    """Room for one input on the device: what it holds, and the end of the copy that brought it."""

    bytes: torch.Tensor
    holds: tuple[int, int]
    end: Any
    waited: bool = False


class HostInputs:
    """Keeps the input of every group but the last in host memory. Raises HostMemoryError when that cannot be had.

    groups: of layers in one forward pass. bytes_each: of the largest input. placement: of the memory; None: wherever the process
    allocates. pin: register it, so that copies run beside the computation. lanes: None: some of its own.
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
    ) -> None:
        self._device = device
        self._lanes = lanes or lanes_of(device)
        what = f"checkpointing.mode: cpu keeps {groups - 1} layer inputs"
        less = ", a higher checkpointing.every or checkpointing=gpu"
        self._arenas = arenas(groups - 1, bytes_each, placement, pin=pin, what=what, less=less)
        self._slots = [_Slot(row) for arena in self._arenas for row in arena]
        self._buffers: list[_Buffer | None] = [None, None]
        self._leaving: tuple[KeptInput, torch.Tensor, Any] | None = None
        self._forward = 0

    def host_tensors(self) -> list[torch.Tensor]:
        """The memory that inputs wait in, for an audit by role."""
        return self._arenas

    def keep(self, group: int, hidden_states: torch.Tensor) -> KeptInput:
        """Take the input of a group, in the forward pass; groups come in order."""
        self._release_left()
        if group == 0:
            self._forward += 1
            self._drop_buffers()
        # Of a strided input a contiguous copy leaves; it is the copy that must stay until it has.
        source = hidden_states.detach() if hidden_states.is_contiguous() else hidden_states.detach().contiguous()
        kept = KeptInput(self, group, self._forward, hidden_states.requires_grad, source._version)
        if group == len(self._slots):
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
        # Until the compute stream has waited for the copy, the input must stay: the allocator would give its memory away.
        self._leaving = kept, source, self._lanes.copy(Lane.to_host, slot.bytes[: slot.used], as_bytes(source))
        return kept

    def _release_left(self) -> None:
        """The input before has had a whole group's time to leave: wait for it, which takes no time, and let it go."""
        if self._leaving:
            kept, source, end = self._leaving
            self._leaving = None
            self._lanes.wait(end)
            kept.check(source)

    def restore(self, kept: KeptInput) -> torch.Tensor:
        """The input on the device again, in the backward pass; the one before it sets out."""
        if kept.stayed is None:
            states = self._arrived(kept.group, kept.forward)
        else:
            states = kept.stayed
            kept.check(states)
        if kept.group > 0:
            self._bring(kept.group - 1, kept.forward)
        else:
            self._drop_buffers()
        return states.detach().requires_grad_(kept.requires_grad)

    def _arrived(self, group: int, forward: int) -> torch.Tensor:
        buffer = self._bring(group, forward)
        self._lanes.wait(buffer.end)
        buffer.waited = True
        slot = self._slots[group]
        return buffer.bytes[: slot.used].view(slot.dtype).view(slot.shape)

    def _bring(self, group: int, forward: int) -> _Buffer:
        """The buffer that holds this input, or will once its copy has ended."""
        slot = self._slots[group]
        if slot.forward != forward:
            raise RuntimeError(
                "checkpointing: this loss is of an earlier forward pass, whose layer inputs a later one has replaced; "
                "call backward before the next forward"
            )
        buffer = self._buffers[group % 2]
        if buffer is None or buffer.bytes.numel() < slot.used:
            # From the compute stream's memory; the copy is behind whatever that stream still does in it.
            buffer = _Buffer(torch.empty(slot.used, dtype=torch.uint8, device=self._device), (-1, -1), None)
            self._buffers[group % 2] = buffer
        if buffer.holds != (group, forward):
            buffer.end = self._lanes.copy(Lane.to_device, buffer.bytes[: slot.used], slot.bytes[: slot.used])
            buffer.holds, buffer.waited = (group, forward), False
        return buffer

    def _drop_buffers(self) -> None:
        """Give the buffers back, those with a copy that nobody waited for (the backward pass had failed) after it."""
        for buffer in self._buffers:
            if buffer and not buffer.waited:
                self._lanes.wait(buffer.end)
        self._buffers = [None, None]


@dataclass(slots=True)
class KeptInput:
    """One input that waits."""

    owner: HostInputs
    group: int
    forward: int
    requires_grad: bool
    version: int
    stayed: torch.Tensor | None = None

    def restore(self) -> torch.Tensor:
        return self.owner.restore(self)

    def check(self, input: torch.Tensor) -> None:
        """Raise where the layer has written into its own input: what waits may be either state of it."""
        if input._version != self.version:
            raise RuntimeError(
                f"checkpointing: a layer of group {self.group} changes its input in place; use checkpointing=none"
            )
