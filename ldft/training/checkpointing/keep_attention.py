"""Keeps attention outputs from the forward pass, so that recomputing a checkpointed layer does not rerun attention.

At long context, attention is the most expensive part of a layer's forward pass, but its output is no larger than the layer's input:
the best ratio of time saved to memory among all activations (MEMO, arXiv 2407.12117, also keeps it in host memory).

How: torch's checkpoint takes a pair of contexts, one around the forward pass, one around the recomputation. ldft's are dispatch
modes, which see each operator below autograd. The first stores what an attention operator returns: the output and everything that
its backward needs, such as the log-sum-exp and dropout's random state. The second returns this for the same call. So autograd
builds the usual node: queries, keys and values from the recomputation, output and log-sum-exp from the forward pass.

Why not torch's create_selective_checkpoint_contexts: it keeps outputs where they are and counts the calls of every other operator.
This module must handle memory, streams, and the random state after attention's dropout itself.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldft.errors import ConfigError

# Operators that compute attention as a whole, by their dispatcher names. All return the output first, then the log-sum-exp.
OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)

Outputs = tuple[Any, ...]
"""The return values of an attention operator: tensors, numbers or None."""


class WaitingOutputs(Protocol):
    """The outputs of one attention call, kept for its backward pass."""

    def restore(self) -> Outputs:
        """The outputs on the device, detached."""


class Store(Protocol):
    """Keeps attention outputs."""

    def keep(self, group: int, position: int, outputs: Outputs) -> WaitingOutputs:
        """Take the outputs of the call at `position` in a group; both numbers come in order, and 0, 0 begins a new forward pass."""

    def end(self, group: int) -> None:
        """Called when the group's forward pass has ended."""

    def host_tensors(self) -> list[torch.Tensor]:
        """The host memory for outputs, allocated before training; empty if none."""


class Held:
    """Outputs that stay where they are. Also detects a layer that writes into outputs while they are being copied."""

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = tuple(detached(value) for value in outputs)
        self._versions = [_version(value) for value in self.outputs]

    def restore(self) -> Outputs:
        self.check()
        return tuple(detached(value) for value in self.outputs)

    def check(self) -> None:
        """Raise if an output has been modified since."""
        if [_version(value) for value in self.outputs] != self._versions:
            raise RuntimeError(
                "checkpointing: a layer changes the output of its attention in place; use checkpointing.keep_attention=none"
            )


class DeviceOutputs:
    """Outputs stay on the device."""

    def keep(self, group: int, position: int, outputs: Outputs) -> WaitingOutputs:
        return Held(outputs)

    def end(self, group: int) -> None:
        pass

    def host_tensors(self) -> list[torch.Tensor]:
        return []


class KeptAttention:
    """Creates the pair of contexts for each checkpointed group. operators: can be replaced in tests."""

    def __init__(self, store: Store, operators: frozenset[str] = OPERATORS) -> None:
        self.store, self.operators = store, operators

    def contexts(self, group: int) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """The contexts for a group's forward pass and for its recomputation."""
        kept: list[_Call] = []
        return _Keep(self, group, kept), _Give(self, kept)


class _Call:
    """One attention call: its operator, its kept outputs, and the random state after it."""

    def __init__(self, operator: str, device: torch.device, waiting: WaitingOutputs) -> None:
        self.operator, self._device, self._waiting = operator, device, waiting
        self._random = _random_state(device)

    def repeat(self) -> Outputs:
        """Return the outputs and set the random state as after the call, so that later dropout draws the same as in the forward
        pass."""
        _set_random_state(self._device, self._random)
        return self._waiting.restore()


class _Keep(TorchDispatchMode):
    def __init__(self, owner: KeptAttention, group: int, kept: list[_Call]) -> None:
        super().__init__()
        self._owner, self._group, self._kept = owner, group, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.name() in self._owner.operators:
            waiting = self._owner.store.keep(self._group, len(self._kept), tuple(outputs))
            self._kept.append(_Call(func.name(), outputs[0].device, waiting))
        return outputs

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        self._owner.store.end(self._group)
        if kind is None and not self._kept:
            raise ConfigError(
                "checkpointing.keep_attention",
                "attention ran as no operator whose output can be kept (another package version, a mask or dropout can be the "
                "reason); use none, or another attention.kind",
            )


class _Give(TorchDispatchMode):
    def __init__(self, owner: KeptAttention, kept: list[_Call]) -> None:
        super().__init__()
        self._owner, self._kept, self._next = owner, kept, 0

    def __enter__(self) -> _Give:
        self._next = 0  # a retained graph may be run backward again
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in self._owner.operators:
            return func(*args, **(kwargs or {}))
        if self._next == len(self._kept) or self._kept[self._next].operator != func.name():
            raise RuntimeError(f"checkpointing: the recomputation calls {func.name()}, which the forward pass did not")
        self._next += 1
        return self._kept[self._next - 1].repeat()


def detached(value: Any) -> Any:
    """An alias without a graph that shares the version counter; a value that is not a tensor is returned unchanged.

    Below autograd, `detach` would start a new counter without this dispatch key (as in torch/utils/checkpoint.py, 2.13).
    """
    if not isinstance(value, torch.Tensor):
        return value
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return value.detach()


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
