"""What the options of `numa.strategy` mean: bytes by role -> nodes and weights by role. Without torch and Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ldft.memory.planner import DoesNotFit, reduced

# Most latency-critical first: what the optimizer step streams most of, then what the GPU alone touches (the paper's order).
PRIORITY = (
    "momentum",
    "variance",
    "master_gradients",
    "master_weights",
    "compute_weights",
    "activations",
    "compute_gradients",
)
# The allocator's largest weight: the finest split.
_FINEST = 1 << 20

Weights = dict[str, dict[int, int]]
"""Role -> node -> integer weight."""


def greedy(
    sizes: Mapping[str, float],
    local: Sequence[int],
    cxl: Sequence[int],
    local_budget: float,
    cxl_budget: float = float("inf"),
) -> Weights:
    """The paper's placement: by PRIORITY into local memory until its budget is full, the rest into CXL; evenly within a set.

    The role that does not fit as a whole is split: what is left of the budget locally, not a byte more (to one part in 2^20, and
    never above). sizes and budgets in bytes, all ranks together. Raises DoesNotFit where the CXL budget is exceeded.
    """
    weights: Weights = {}
    left, beyond = local_budget, 0.0
    for role in sorted(sizes, key=_rank):
        size = sizes[role]
        share = min(1.0, left / size) if size > 0 and cxl else 1.0
        # Of _FINEST parts; those of each node of a set are the same, so that a set of several is even.
        near = int(share * _FINEST)
        far = _FINEST - near
        scale = max(1, len(local)) * max(1, len(cxl))
        of = dict.fromkeys(local, near * scale // max(1, len(local)))
        of |= dict.fromkeys(cxl, far * scale // max(1, len(cxl)))
        weights[role] = reduced(of)
        left = left - size if far == 0 else 0.0
        beyond += size * far / _FINEST
    if beyond > cxl_budget or left < 0:
        raise DoesNotFit(
            f"the roles need {sum(sizes.values()) / 2**30:.1f} GiB, the budgets give {(local_budget + cxl_budget) / 2**30:.1f} GiB"
        )
    return weights


def _rank(role: str) -> int:
    return PRIORITY.index(role) if role in PRIORITY else len(PRIORITY)
