"""torch's scaled dot-product attention for GPUs and precisions whose fused kernels do not support grouped heads.

Below compute capability 8.0 and in fp32, the memory-efficient kernel is the only fused one, and it needs as many key heads as query
heads. Given grouped heads, as transformers passes them, torch falls back to plain products, which store all scores: tokens x tokens
for each head, 64 GiB at 32768 tokens and 32 heads in fp16. Repeating keys and values costs far less.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ldft.preflight import attention

NAME = attention.REPEATED_HEADS


def register() -> None:
    """Register `attn_implementation="sdpa_repeated_heads"`, with SDPA's masks: none for a full causal batch."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def forward(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **named: Any
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention for (batch, heads, tokens, head_dim), with keys and values repeated for each query head."""
    groups = query.shape[1] // key.shape[1]
    # The function reads only two things from the module: grouped heads, of which there are none left, and causality.
    alike = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    repeated = (repeat_kv(tensor, groups) for tensor in (key, value))
    return cast(
        "tuple[torch.Tensor, None]", sdpa_attention_forward(cast("Any", alike), query, *repeated, *others, **named)
    )
