"""Watches what a model does: one forward pass of two tokens on the meta device, in which attention and rotary embeddings report.

Nothing large is computed or allocated, so a model of any size is watched in a second or two. What attention is told (heads,
windows, soft caps) and the angles that tokens are rotated by are those of the model that trains, whatever its family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

NAME = "ldft_observed"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer's attention was told."""

    layer: int | None
    heads: int
    key_value_heads: int
    head_dim: int
    mask_window: int | None
    """Window of the mask, tokens, which SDPA and eager attention follow."""
    argument_window: int | None
    """Window given beside the mask, tokens, which flash attention follows."""
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of a rotary embedding."""

    layer_type: str | None
    inv_freq: torch.Tensor
    """Angle per position of each element, or of each pair of elements."""
    factor: torch.Tensor
    """Scale of the rotated elements, as inv_freq."""


@dataclass(slots=True)
class Observed:
    """What was seen. failure: the exception that ended the pass early; what comes later is missing."""

    attention: list[AttentionCall] = field(default_factory=list)
    rotations: list[Rotation] = field(default_factory=list)
    logit_softcap: float = 0.0
    failure: Exception | None = None


def build(architecture: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device, for `watch`. Its parameters have the sizes and the order of any model of this architecture."""
    AttentionInterface.register(NAME, _forward_unwatched)

    def made(attention: str) -> PreTrainedModel:
        with no_init_weights(), torch.device("meta"):
            # A copy, because transformers notes attention and precision in the config. Grouped products need half precision.
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(architecture), attn_implementation=attention, dtype=torch.bfloat16
            )

    try:
        model = made(NAME)
    except KeyError as error:
        if error.args != (NAME,):
            raise
        model = made("eager")  # a family with classes by kind of attention, which cannot be watched
    model.tie_weights()
    return model


def _forward_unwatched(*args: Any, **named: Any) -> Any:
    raise AssertionError("a model on the meta device computes only while it is watched")


def watch(model: PreTrainedModel, seq_len: int) -> Observed:
    """Run two tokens, the second at the end of a sequence of `seq_len`, through a model from `build`."""
    seen = Observed()
    windows: dict[int, int | None] = {}
    masks: list[torch.Tensor] = []

    def mask(*args: Any, local_size: int | None = None, **named: Any) -> torch.Tensor:
        made = torch.empty(1, 1, 2, 2, device="meta", dtype=torch.bool)
        masks.append(made)  # kept, so that its id stays its own
        # Llama 4 divides sequences into chunks, which are no windows.
        chunk = getattr(model.config, "attention_chunk_size", None)
        windows[id(made)] = None if local_size == chunk else local_size
        return made

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None = None, *args: Any, **named: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        seen.attention.append(
            AttentionCall(
                layer=getattr(module, "layer_idx", None),
                heads=query.shape[1],
                key_value_heads=key.shape[1],
                head_dim=query.shape[-1],
                mask_window=windows.get(id(attention_mask)),
                argument_window=named.get("sliding_window"),
                softcap=named.get("softcap"),
            )
        )
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    for module, owner in rotary_embeddings(model):
        module.forward = _reporting(module, owner, seq_len, seen)
    logits = _Logits(model.config.vocab_size)
    try:
        with torch.no_grad(), torch.device("meta"), logits:
            _run(model)
    except Exception as error:  # kept: the caller tells a model that cannot run from one that cannot be watched
        seen.failure = error
    finally:
        AttentionInterface.register(NAME, _forward_unwatched)
    seen.logit_softcap = logits.cap
    return seen


def _run(model: PreTrainedModel) -> None:
    """The forward pass, in which transformers may look at values of the mask or of the positions. The meta device has none."""
    tokens = torch.ones(1, 2, dtype=torch.long, device="meta")
    try:
        # With a mask, transformers does not look for several sequences in the positions.
        model(input_ids=tokens, attention_mask=tokens)
    except RuntimeError as error:
        if not looks_at_values(error):
            raise
        # Layers with a state look at the mask; positions in host memory have values.
        model(input_ids=tokens, position_ids=torch.tensor([[0, 1]], device="cpu"))


def looks_at_values(error: Exception) -> bool:
    """Whether code failed only because it looked at values, which tensors on the meta device do not have."""
    texts = ("cannot be called on meta tensors", "Cannot copy out of meta tensor")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def rotary_embeddings(model: PreTrainedModel) -> list[tuple[Any, PreTrainedModel]]:
    """Rotary embeddings, each with the model that initialises it."""
    found = []
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        if any(name.endswith("inv_freq") for name in names) and hasattr(module, "config"):
            found.append((module, model))
    return found


def _reporting(module: Any, owner: PreTrainedModel, seq_len: int, seen: Observed) -> Callable[..., Any]:
    """A forward for `module` that computes and reports the real angles at positions 1 and seq_len - 1."""
    with torch.device("cpu"):
        real = type(module)(module.config)
        owner._init_weights(real)  # as it is done for the model that trains

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **named: Any) -> Any:
        with torch.device("cpu"):
            positions = torch.tensor([1, max(seq_len - 1, 1)]).expand(position_ids.shape)
            outputs = real(torch.zeros(1, 2, 1), positions, *args, **named)
        layer_type = named.get("layer_type", args[0] if args and isinstance(args[0], str) else None)
        seen.rotations.append(Rotation(layer_type, *_polar(outputs)))
        if isinstance(outputs, torch.Tensor):
            return outputs.to("meta")
        return tuple(one.to("meta", x.dtype) for one in outputs)

    return forward


def _polar(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Angle and scale of each element at the first position, from (cos, sin) or complex numbers."""
    if isinstance(outputs, torch.Tensor):
        first = outputs.reshape(-1, outputs.shape[-1])[0]
        return first.angle(), first.abs()
    cos, sin = (one.double().reshape(-1, one.shape[-1])[0] for one in outputs[:2])
    return torch.atan2(sin, cos), torch.hypot(sin, cos)


class _Logits(TorchDispatchMode):
    """Finds the soft cap of the logits: a tanh as wide as the vocabulary, and the number that it is divided by before."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._width = vocab_size
        self._divisor = 1.0
        self.cap = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.ndim and first.shape[-1] == self._width:
            operation = func.overloadpacket
            if operation is torch.ops.aten.div and not isinstance(args[1], torch.Tensor):
                self._divisor = float(args[1])
            if operation in (torch.ops.aten.tanh, torch.ops.aten.tanh_):
                self.cap = self._divisor
        return func(*args, **(kwargs or {}))
