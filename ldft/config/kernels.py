"""Fused GPU kernels in place of PyTorch's modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    liger: bool | None = None
    """Liger Kernel: fused norms, rotary embedding, MLP and loss, without logits of tokens x vocabulary. null: on CUDA where the
    model's family is supported and liger-kernel is installed."""
