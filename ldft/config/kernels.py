"""Fused GPU kernels that replace PyTorch's modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    liger: bool | None = None
    """Liger Kernel: fused norms, rotary embedding, MLP and loss; the logits (tokens x vocabulary) are never stored. null: use it on
    CUDA if it supports the model's family and liger-kernel is installed."""
