"""torch's scaled dot-product attention restricted to the cuDNN backend, as an attention function for transformers.

It is a function because a context manager around forward would not cover the recomputation of checkpointed layers in backward.
There is no fallback: if cuDNN refuses, the error says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ldft.errors import ConfigError

NAME = "sdpa_cudnn"


def register() -> None:
    """Register `attn_implementation="sdpa_cudnn"`, with SDPA's masks: none for a full causal batch."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for queries (batch, heads, tokens, head_dim); keys and values may have fewer heads, which cuDNN reads without
    copies. Returns (batch, tokens, heads, head_dim), as transformers expects. Raises ConfigError if cuDNN does not support it.
    """
    if others.get("softcap") is not None:
        raise ConfigError("attention.kind", f"{NAME} does not support soft caps; use eager or flash_attention_2")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=grouped,
        )

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        parameters = SDPAParams(query, key, value, attention_mask, dropout, causal, grouped)
        if not can_use_cudnn_attention(parameters):
            raise ConfigError("attention.kind", f"{NAME}: cuDNN refuses this: {_reason(attend)}; use sdpa")
        output = attend()
    return output.transpose(1, 2).contiguous(), None


def _reason(attend: Callable[[], torch.Tensor]) -> str:
    """torch's reasons for not using cuDNN, from the warnings before it gives up, which list the reasons of each backend.

    can_use_cudnn_attention(debug=True) prints the same, but (torch 2.11) directly to stderr, not as Python warnings.
    """
    with warnings.catch_warnings(record=True) as said, suppress(RuntimeError):
        warnings.simplefilter("always")
        attend()
    texts = [str(warning.message).split(" (Triggered")[0] for warning in said]
    heads = [i for i, text in enumerate(texts) if text.lower().startswith("cudnn") and "not used because" in text]
    return "; ".join(texts[heads[-1] + 1 :] if heads else texts) or "torch gives no reason"
