"""Lion for an optimizer that is not offloaded: torch has none, and DeepSpeed's FusedLion must be compiled with nvcc.

With offload, HostLion is used. Both do the same arithmetic (Chen et al., Symbolic Discovery of Optimization Algorithms,
arXiv 2302.06675, program 1); a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class DeviceLion(torch.optim.Optimizer):
    """One momentum; every step has the same size: the sign of a mix of momentum and gradient. Memory-bound, a few passes over
    each."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, and no loss to return
        """Update every parameter that has a gradient. Takes no closure."""
        assert closure is None
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            gradients = [weight.grad for weight in weights]
            momenta = [self.state[weight]["exp_avg"] for weight in weights]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
