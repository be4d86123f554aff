"""For tests of what waits in host memory: gradients of a step, how far they are apart, and copies that come late."""

from __future__ import annotations

import torch
from torch import nn

from ldft.training.checkpointing.copies import CudaLanes, Lane

POISON = 0xFF  # as bytes of a float: NaN
SLEEP = 2_000_000  # cycles, about a millisecond


def gradients(network: nn.Module, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    network.zero_grad()
    torch.manual_seed(seed)
    batch = torch.randint(512, (1, tokens), device="cuda")
    network(input_ids=batch, labels=batch).loss.backward()
    found = []
    for parameter in network.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert not x.isnan().any() and not y.isnan().any()
        worst = max(worst, float((x.float() - y.float()).abs().max() / y.float().abs().max().clamp(min=1e-9)))
    return worst


# What sums in another order make of a gradient, relative to the largest of its tensor: some units in the last place.
_REORDERED = {torch.float32: 32 * torch.finfo(torch.float32).eps, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}


def tolerance(network: nn.Module, tokens: int, expected: list[list[torch.Tensor]]) -> float:
    """How far gradients of equal passes may be apart. expected: those of seeds 0, 1, ...

    Some kernels add in any order: what repeated passes differ by is the measure. A few repetitions may happen to agree to the last
    bit, so it is never below what one change of order makes.
    """
    repeated = max(difference(gradients(network, tokens, seed), of) for seed, of in enumerate(expected))
    allowed = max(4 * repeated, _REORDERED[next(network.parameters()).dtype])
    assert difference(expected[0], expected[1]) > 3 * allowed, "other inputs must be told apart"
    return allowed


class SlowLanes(CudaLanes):
    """Copies late, targets poisoned before: whoever does not wait, or is not waited for, computes with NaN."""

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        if lane is Lane.to_device:
            target.fill_(POISON)
        with torch.cuda.stream(self._streams[lane]):
            torch.cuda._sleep(4 * SLEEP)
        return super().copy(lane, target, source)
