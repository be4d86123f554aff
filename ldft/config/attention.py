"""Which kernels compute attention."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class AttentionKind(Enum):
    """auto: the fastest kernel that the machine and the model support; sdpa: torch's choice; sdpa_cudnn: torch's SDPA restricted to
    cuDNN; flash_attention_2, _3, _4: the flash-attn packages; eager: plain matrix products."""

    auto = "auto"
    sdpa = "sdpa"
    sdpa_cudnn = "sdpa_cudnn"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"
    flash_attention_4 = "flash_attention_4"
    eager = "eager"


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    kind: AttentionKind = AttentionKind.auto
    """Attention implementation; the column `attention` records which one ran."""
