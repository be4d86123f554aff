"""Outputs of attention that wait in host memory, beside the layer inputs (layer_inputs.py) and in the same lanes.

    forward   compute |  layer 0  |  layer 1  |  layer 2  | loss
              to host |       0   |       1   |             those of the last group stay: its backward comes first
    backward  compute |  layer 2  |  layer 1  |  layer 0  |
              to device    1      |    0      |

An output leaves while the rest of its layer runs and is let go at the end of its group. It comes back one call ahead: when the
recomputation asks for one, the next to be asked for sets out. Of a single layer a group there are two on the device at most,
the one in use and the one on its way; of several, those of the group under way are in use together, as are its other activations.

A slot takes all that one call of attention returned but what is small. Device memory for what comes back is new each time: autograd
frees it as it goes, earlier than buffers of ours could be free. Why that is safe: see copies.py; one that is on its way is held
here until the compute stream has waited for its copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ldft.memory.policy import Placement
from ldft.training.checkpointing.copies import Lane, Lanes, aligned, arenas, as_bytes, lanes_of
from ldft.training.checkpointing.keep_attention import Held, Outputs, detached

# Smaller ones, such as the state of a generator, are not worth a copy.
_SMALL = 4096

Key = tuple[int, int]
"""Group and position in it."""


class HostOutputs:
    """Keeps what attention returns in host memory, but for the last group. Raises HostMemoryError when that cannot be had.

    groups: of `every` layers each, with one call of attention a layer. bytes_each: of what one call returns. placement, pin: as
    for HostInputs. lanes: those of the inputs; None: some of its own.
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
        self._device, self._lanes = device, lanes or lanes_of(device)
        self._groups, self._every = groups, every
        slots = (groups - 1) * every
        what = f"checkpointing.keep_attention: host keeps {slots} attention outputs"
        less = " or checkpointing.keep_attention=none"
        self._arenas = arenas(slots, bytes_each, placement, pin=pin, what=what, less=less)
        self._slots: list[torch.Tensor] = [row for arena in self._arenas for row in arena]
        self._owner = [-1] * slots
        self._sizes: dict[Key, int] = {}
        self._leaving: list[tuple[Held, list[Any]]] = []
        self._coming: tuple[Key, torch.Tensor, Any] | None = None
        self._forward = 0

    def host_tensors(self) -> list[torch.Tensor]:
        """The memory that outputs wait in, for an audit by role."""
        return self._arenas

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
        """Begin the copies into a slot. Returns what must stay until they have ended: sources and ends."""
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
        """The group's forward pass has ended: its last output has had the rest of a layer to leave."""
        self._release_left()

    def _release_left(self) -> None:
        """Wait for what leaves, which takes no time by now, and let it go."""
        leaving, self._leaving = self._leaving, []
        for held, sent in leaving:
            for _, end in sent:
                self._lanes.wait(end)
            held.check()

    def restore(self, kept: KeptOutputs) -> Outputs:
        """All that the call returned, on the device, in the backward pass; the next to be asked for sets out."""
        outputs = kept.stayed.restore() if kept.stayed else self._arrived(kept)
        after = self._after(kept.key)
        if after in self._sizes and after[0] < self._groups - 1:
            self._bring(after, kept.forward)
        return outputs

    def _after(self, key: Key) -> Key:
        """Which output the backward pass asks for next: groups backward, within one forward."""
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
        """The device memory that holds this output, or will once its copy has ended."""
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
        """Give back what nobody asked for (the backward pass had failed), after its copy."""
        if self._coming:
            self._lanes.wait(self._coming[2])
        self._coming = None

    def _number(self, key: Key) -> int:
        return key[0] * self._every + key[1]

    def _slot(self, key: Key) -> torch.Tensor:
        return self._slots[self._number(key)]


@dataclass(slots=True)
class KeptOutputs:
    """What one call of attention returned: each large tensor as the layout of what waits in the slot, the rest as it is."""

    owner: HostOutputs
    key: Key
    forward: int
    parts: list[Any] = field(default_factory=list)
    stayed: Held | None = None

    def restore(self) -> Outputs:
        return self.owner.restore(self)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a tensor lies in a contiguous run of bytes: outputs are often permuted, as backward kernels may want them."""

    shape: tuple[int, ...]
    """In the order of memory."""
    order: tuple[int, ...]
    """The tensor's dimensions in that order."""
    dtype: torch.dtype
    size: int

    def unpack(self, bytes_: torch.Tensor) -> torch.Tensor:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return bytes_.view(self.dtype).view(self.shape).permute(inverse)


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.nbytes > _SMALL


def _pack(tensor: torch.Tensor) -> tuple[torch.Tensor, _Layout]:
    """The tensor with its dimensions in the order of memory, contiguous, and how to undo that. Copies only where it has gaps."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))
    source = tensor.permute(order).contiguous()
    return source, _Layout(tuple(source.shape), order, source.dtype, source.nbytes)
