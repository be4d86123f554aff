"""Fused GPU kernels that replace PyTorch's modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    liger: bool | None = None
    """Liger Kernel: fused norms, rotary embedding, MLP and loss; the logits (tokens x vocabulary) are never stored. null: use it on
    CUDA if it supports the model's family and liger-kernel is installed."""

    mlp_tiles: int | None = None
    """In how many tiles of tokens a recomputed layer's MLP runs, so that its activations exist for one tile at a time; 1: none.
    null: 16 from 65536 tokens per micro-batch on, where it is possible."""
