"""The update of csrc/update.cpp on a GPU, with its roundings: a weight gets the same bits wherever it is updated.

Each operation is one PTX instruction with its rounding written out, which no compiler contracts, reorders or flushes to zero.
Kernels have no annotations, since Triton takes them for values.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _mul(a, b):
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _fma(a, b, c):
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _div(a, b):
    return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sqrt(a):
    return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit  # pointers of arrays, numbers of fp32
def _adamw(
    weights, gradients, momentum, variance, copy, count, factor, beta1, beta2,
    new1, new2, epsilon, inverse_bias2, step, decay, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gradient = _mul(tl.load(gradients + at, inside).to(tl.float32), factor)
    m = _fma(gradient, new1, _mul(tl.load(momentum + at, inside), beta1))
    v = _fma(_mul(gradient, gradient), new2, _mul(tl.load(variance + at, inside), beta2))
    direction = _div(m, _fma(_sqrt(v), inverse_bias2, epsilon))
    w = tl.load(weights + at, inside)
    w = _fma(direction, step, _fma(w, decay, w))
    tl.store(momentum + at, m, inside)
    tl.store(variance + at, v, inside)
    tl.store(weights + at, w, inside)
    tl.store(copy + at, w.to(copy.dtype.element_ty), inside)


@triton.jit
def _lion(
    weights, gradients, momentum, copy, count, factor, beta1, beta2, new1, new2,
    rate, kept, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gradient = _mul(tl.load(gradients + at, inside).to(tl.float32), factor)
    m = tl.load(momentum + at, inside)
    direction = _fma(gradient, new1, _mul(m, beta1))
    # copysign(-rate, direction), for zeros of either sign too
    against = tl.where(direction.to(tl.int32, bitcast=True) < 0, rate, -rate)
    w = _fma(tl.load(weights + at, inside), kept, against)
    tl.store(momentum + at, _fma(gradient, new2, _mul(m, beta2)), inside)
    tl.store(weights + at, w, inside)
    tl.store(copy + at, w.to(copy.dtype.element_ty), inside)


def adamw(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    momentum: torch.Tensor,
    variance: torch.Tensor,
    copy: torch.Tensor | None,
    factor: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    inverse_bias2: float,
    step: float,
    decay: float,
) -> None:
    """One step of AdamW on flat, contiguous tensors of one GPU; the scalars are those of `AdamW` in csrc/update.h.

    copy: receives the new weights in its precision.
    """
    scalars = (factor, beta1, beta2, _complement(beta1), _complement(beta2), epsilon, inverse_bias2, step, decay)
    with torch.cuda.device(weights.device):
        _adamw[_grid(weights)](
            weights, gradients, momentum, variance, weights if copy is None else copy, weights.numel(), *scalars, BLOCK=_BLOCK
        )  # fmt: skip


def lion(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    momentum: torch.Tensor,
    copy: torch.Tensor | None,
    factor: float,
    beta1: float,
    beta2: float,
    rate: float,
    weight_decay: float,
) -> None:
    """One step of Lion; as `adamw`."""
    kept = float(np.float32(1) - np.float32(rate) * np.float32(weight_decay))
    scalars = (factor, beta1, beta2, _complement(beta1), _complement(beta2), rate, kept)
    with torch.cuda.device(weights.device):
        _lion[_grid(weights)](
            weights, gradients, momentum, weights if copy is None else copy, weights.numel(), *scalars, BLOCK=_BLOCK
        )


def _complement(value: float) -> float:
    """1 - value in fp32."""
    return float(np.float32(1) - np.float32(value))


def _grid(weights: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(weights.numel(), _BLOCK),)
