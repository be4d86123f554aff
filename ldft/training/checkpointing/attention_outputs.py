"""Attention outputs in host memory, beside the layer inputs (layer_inputs.py) and over the same lanes.

    forward   compute |  layer 0  |  layer 1  |  layer 2  | loss
              to host |       0   |       1   |             the last group's stay: its backward comes first
    backward  compute |  layer 2  |  layer 1  |  layer 0  |
              to device    1      |    0      |

An output is copied out while the rest of its layer runs, and freed on the device at the end of its group. It is copied back one
call ahead: when the recomputation requests an output, the copy of the next one begins. With one layer per group, at most two
outputs are on the device: the one in use and the one being copied. With several, a group's outputs are all in use together, like
its other activations.

A slot holds all tensors that one call of attention returned, except small ones. Each copy back gets new device memory: autograd
frees it earlier than a fixed buffer would become free. copies.py explains why that is safe; a tensor whose copy is under way is
referenced here until the compute stream has waited for that copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ldft.memory.policy import Placement
from ldft.training.checkpointing.copies import HostSlots, Lane, Lanes, aligned, as_bytes
from ldft.training.checkpointing.keep_attention import Held, Outputs, detached

# Smaller ones, such as the state of a generator, are not worth a copy.
_SMALL = 4096

Key = tuple[int, int]
"""Group and position in it."""


class HostOutputs(HostSlots):
    """Keeps the outputs of attention in host memory, except for the last group. Raises HostMemoryError if that memory cannot be
    allocated.

    groups: layer groups per forward pass. every: layers in a group; each calls attention once. bytes_each: bytes of all tensors
    that one call returns. placement, pin: as for HostInputs. lanes: those of the inputs; None: create new ones.
    """

    def __init__(
        self,
        groups: int,
        every: int,
        bytes_each: int,
        device: torch.device,
        placement: Placement | None = None,
        *,
        pin: bool = False,
        lanes: Lanes | None = None,
    ) -> None:
        slots = (groups - 1) * every
        what = f"checkpointing.keep_attention: host keeps {slots} attention outputs"
        less = " or checkpointing.keep_attention=none"
        super().__init__(slots, bytes_each, device, placement, pin=pin, lanes=lanes, what=what, less=less)
        self._groups, self._every = groups, every
        self._owner = [-1] * slots
        self._sizes: dict[Key, int] = {}
        self._leaving: list[tuple[Held, list[Any]]] = []
        self._coming: tuple[Key, torch.Tensor, Any] | None = None
        self._forward = 0

    def keep(self, group: int, position: int, outputs: Outputs) -> KeptOutputs:
        """Take what one call of attention returned, in the forward pass."""
        self._release_left()
        if (group, position) == (0, 0):
            self._forward += 1
            self._sizes = {}
            self._drop_coming()
        if position >= self._every:
            raise RuntimeError("checkpointing: a layer calls attention twice; use checkpointing.keep_attention=none")
        held = Held(outputs)
        kept = KeptOutputs(self, (group, position), self._forward)
        if group == self._groups - 1:
            kept.stayed = held
            self._sizes[kept.key] = 0
            return kept
        packed = [_pack(value) if _is_large(value) else None for value in held.outputs]
        kept.parts = [value if part is None else part[1] for value, part in zip(held.outputs, packed, strict=True)]
        sources = [part[0] for part in packed if part is not None]
        self._leaving.append((held, self._send(kept, sources)))
        return kept

    def _send(self, kept: KeptOutputs, sources: list[torch.Tensor]) -> list[Any]:
        """Begin the copies into a slot. Returns sources and ends, which the caller keeps until the copies have ended."""
        slot, number = self._slot(kept.key), self._number(kept.key)
        self._owner[number] = -1
        size = sum(aligned(source.nbytes) for source in sources)
        if size > slot.numel():
            raise RuntimeError(
                f"checkpointing: attention returned {size} bytes, {slot.numel()} were expected; "
                "no batch may have more tokens than train.micro_batch_size * seq_len.tokens"
            )
        self._owner[number], self._sizes[kept.key] = self._forward, size
        sent, first = [], 0
        for source in sources:
            end = self._lanes.copy(Lane.to_host, slot[first : first + source.nbytes], as_bytes(source))
            sent.append((source, end))
            first += aligned(source.nbytes)
        return sent

    def end(self, group: int) -> None:
        """The group's forward pass has ended; its last output was being copied during the rest of its layer."""
        self._release_left()

    def _release_left(self) -> None:
        """Wait for the copies out, which have normally ended by now, and drop their sources."""
        leaving, self._leaving = self._leaving, []
        for held, sent in leaving:
            for _, end in sent:
                self._lanes.wait(end)
            held.check()

    def restore(self, kept: KeptOutputs) -> Outputs:
        """All that the call returned, on the device, in the backward pass. Begins the copy of the output that is requested next."""
        outputs = kept.stayed.restore() if kept.stayed else self._arrived(kept)
        after = self._after(kept.key)
        if after in self._sizes and after[0] < self._groups - 1:
            self._bring(after, kept.forward)
        return outputs

    def _after(self, key: Key) -> Key:
        """The output that the backward pass requests next: groups in reverse order, layers of a group in forward order."""
        group, position = key
        return (group, position + 1) if (group, position + 1) in self._sizes else (group - 1, 0)

    def _arrived(self, kept: KeptOutputs) -> Outputs:
        buffer, end = self._bring(kept.key, kept.forward)
        self._lanes.wait(end)
        self._coming = None
        outputs, first = [], 0
        for part in kept.parts:
            if isinstance(part, _Layout):
                outputs.append(part.unpack(buffer[first : first + part.size]))
                first += aligned(part.size)
            else:
                outputs.append(detached(part))
        return tuple(outputs)

    def _bring(self, key: Key, forward: int) -> tuple[torch.Tensor, Any]:
        """Device memory that holds this output once the returned end is reached."""
        if self._owner[self._number(key)] != forward:
            raise RuntimeError(
                "checkpointing: this loss is of an earlier forward pass, whose attention outputs a later one has replaced; "
                "call backward before the next forward"
            )
        if self._coming is None or self._coming[0] != key:
            self._drop_coming()
            slot, size = self._slot(key), self._sizes[key]
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._coming = key, buffer, self._lanes.copy(Lane.to_device, buffer, slot[:size])
        return self._coming[1:]

    def _drop_coming(self) -> None:
        """Drop an output that was never requested, because the backward pass failed, once its copy has ended."""
        if self._coming:
            self._lanes.wait(self._coming[2])
        self._coming = None

    def _number(self, key: Key) -> int:
        return key[0] * self._every + key[1]

    def _slot(self, key: Key) -> torch.Tensor:
        return self._rows[self._number(key)]


@dataclass(slots=True)
class KeptOutputs:
    """What one call of attention returned: for each large tensor its layout in the slot, small values as they are."""

    owner: HostOutputs
    key: Key
    forward: int
    parts: list[Any] = field(default_factory=list)
    stayed: Held | None = None

    def restore(self) -> Outputs:
        return self.owner.restore(self)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a tensor is stored in contiguous bytes. Outputs are often permuted, and backward kernels may need the same strides."""

    shape: tuple[int, ...]
    """From the largest stride to the smallest."""
    order: tuple[int, ...]
    """The tensor's dimensions in the same order."""
    dtype: torch.dtype
    size: int

    def unpack(self, bytes_: torch.Tensor) -> torch.Tensor:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return bytes_.view(self.dtype).view(self.shape).permute(inverse)


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.nbytes > _SMALL


def _pack(tensor: torch.Tensor) -> tuple[torch.Tensor, _Layout]:
    """The tensor with its dimensions by descending stride, contiguous, and how to undo that. Copies only if it has gaps."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))
    source = tensor.permute(order).contiguous()
    return source, _Layout(tuple(source.shape), order, source.dtype, source.nbytes)
