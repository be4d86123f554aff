"""The output of attention is kept by the forward pass, so that computing a checkpointed layer again need not run attention again.

At long context attention is the costly part of a layer's forward pass, and its output is no larger than the layer's input: the best
bargain among all activations (MEMO, arXiv 2407.12117, keeps it in host memory too).

How: torch's checkpoint takes a pair of contexts, one around the forward pass, one around the recomputation. Ours are dispatch
modes: they see each operator below autograd. The first notes what an attention operator returns: the output and all that its
backward needs, such as the log-sum-exp and the random state of dropout. The second answers the same call with it. So autograd makes
the node that it would have made: queries, keys and values of the recomputation, output and log-sum-exp of the forward pass.

Why not torch's create_selective_checkpoint_contexts: it leaves what it keeps where it is and counts the calls of every other
operator. Memory, streams and the random state that attention's dropout leaves behind are ours to handle.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldft.errors import ConfigError

# Operators that are attention as a whole, by what torch's dispatcher calls them. All return the output first, then the log-sum-exp.
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
"""What an attention operator returns: tensors, and numbers or None where it has no tensor."""


class WaitingOutputs(Protocol):
    """What one call of attention returned, waiting for its backward pass."""

    def restore(self) -> Outputs:
        """The same on the device, detached."""


class Store(Protocol):
    """Keeps what attention returns."""

    def keep(self, group: int, position: int, outputs: Outputs) -> WaitingOutputs:
        """Take what the call at `position` of a group returned; both come in order, and 0, 0 begins a new forward pass."""

    def end(self, group: int) -> None:
        """The forward pass of the group has ended."""

    def host_tensors(self) -> list[torch.Tensor]:
        """The host memory that it waits in, made before training; empty if none."""


class Held:
    """Outputs that stay where they are; also guards others, while they are copied, against a layer that writes into them."""

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = tuple(detached(value) for value in outputs)
        self._versions = [_version(value) for value in self.outputs]

    def restore(self) -> Outputs:
        self.check()
        return tuple(detached(value) for value in self.outputs)

    def check(self) -> None:
        """Raise where somebody has written into an output since."""
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
    """Makes the pair of contexts for each checkpointed group. operators: others for tests."""

    def __init__(self, store: Store, operators: frozenset[str] = OPERATORS) -> None:
        self.store, self.operators = store, operators

    def contexts(self, group: int) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """Around the forward pass of a group, and around its recomputation."""
        kept: list[_Call] = []
        return _Keep(self, group, kept), _Give(self, kept)


class _Call:
    """One call of attention: which operator, what waits, and the random state that it left."""

    def __init__(self, operator: str, device: torch.device, waiting: WaitingOutputs) -> None:
        self.operator, self._device, self._waiting = operator, device, waiting
        self._random = _random_state(device)

    def repeat(self) -> Outputs:
        """As if it ran: dropout that comes after it must draw what it drew in the forward pass."""
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
        self._next = 0  # a graph that is kept may be run backward again
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
    """An alias without a graph that shares the version counter; what is no tensor, as it is.

    Below autograd `detach` would start a counter of its own, were it not for the key (as in torch/utils/checkpoint.py, 2.13).
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
