"""The optimizer's step on a GPU gives the bits that csrc/update.cpp gives on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldft.training.optimizers.host_optimizer import HostAdamW, HostLion, HostOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Subnormal, tiny and large numbers, numbers half-way between two of 16 bits, and zeros of both signs.
SPECIAL = (0.0, -0.0, 1e-45, -3e-42, 1.1e-38, 6e-8, 1.00390625, 1.01171875, 1.00048828125, 65519.0, -3e38, 1e20, -1e-20)


def numbers(count: int, seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # All magnitudes: a normal number times a power of two.
    found = torch.randn(count, generator=generator) * scale
    found *= torch.exp2(torch.randint(-30, 4, (count,), generator=generator).float())
    places = torch.randperm(count, generator=generator)[: len(SPECIAL) * (count // 200)]
    found[places] = torch.tensor(SPECIAL).repeat(count // 200)
    return found


def optimizer_of(kind: Any, weights: torch.Tensor) -> HostOptimizer:
    found: HostOptimizer = kind([torch.nn.Parameter(weights)], lr=3e-3, weight_decay=0.03)
    return found


@pytest.mark.parametrize("count", [1, 1023, 200_003])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", [HostAdamW, HostLion])
def test_every_bit_is_that_of_the_cpu(kind: type[HostOptimizer], dtype: torch.dtype, count: int) -> None:
    weights = numbers(count, 1, 1.0).clamp(-1e30, 1e30)
    ours = optimizer_of(kind, weights.clone().cuda())
    reference = optimizer_of(kind, weights.clone())
    copies = [torch.empty(count, dtype=dtype, device=device) for device in ("cuda", "cpu")]
    for step in range(4):
        gradient = numbers(count, 2 + step, 0.1).clamp(-6e4, 6e4).to(dtype)
        for optimizer, copy in zip((ours, reference), copies, strict=True):
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad_dtype = dtype
            parameter.grad = gradient.to(parameter.device)
            optimizer.step(gradient_factor=0.37 if step else 1 / 1024, copy=copy)
        state, theirs = ours.state, reference.state
        (mine,), (other,) = state, theirs
        assert torch.equal(mine.cpu().view(torch.int32), other.view(torch.int32)), step
        for name in kind.moments:
            assert torch.equal(state[mine][name].cpu().view(torch.int32), theirs[other][name].view(torch.int32)), name
        bits = torch.int32 if dtype is torch.float32 else torch.int16
        assert torch.equal(copies[0].cpu().view(bits), copies[1].view(bits)), step
    assert not torch.equal(mine.cpu(), weights)
