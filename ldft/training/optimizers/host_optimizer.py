"""AdamW and Lion over fp32 weights in host memory, in native code (csrc/update.cpp): one pass that includes scaling the gradient
and writing the 16-bit copy of the weights.

On CPUs with FMA, results equal those of DeepSpeed's CPUAdam and CPULion bit for bit (CPULion from 0.19.8 on: before, its vector
code took steps of other sizes). State and groups have the same names, so that checkpoints are interchangeable. Nothing is compiled
at run time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch

from ldft import _native


class HostOptimizer(torch.optim.Optimizer):
    """Common part of both: parameters, gradients and state are contiguous fp32 tensors on the CPU."""

    moments: ClassVar[tuple[str, ...]]
    """Names of the state tensors."""
    fp32_optimizer_states = True  # the name in DeepSpeed's optimizers

    @torch.no_grad()
    def step(self, closure: Any = None, **more: Any) -> None:  # type: ignore[override]  # no closure, and no loss to return
        """Update every parameter that has a gradient; more: arguments of `update`. Takes no closure."""
        assert closure is None
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self.update(weights, group, **more)

    def update(
        self,
        weights: torch.Tensor,
        group: dict[str, Any],
        gradient_factor: float = 1.0,
        rounded: torch.Tensor | None = None,
    ) -> None:
        """Update one parameter with its group's hyperparameters.

        gradient_factor: factor applied to the gradient first; `weights.grad` itself is unchanged. rounded: bf16 CPU tensor with as
        many elements, which receives the new weights.
        """
        state = self.state[weights]
        state.setdefault("step", 0)
        for name in self.moments:
            if name not in state:
                state[name] = torch.zeros_like(weights)
        state["step"] += 1
        assert weights.grad is not None
        tensors = (weights, weights.grad, *(state[name] for name in self.moments))
        assert all(t.is_contiguous() and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        assert all(t.numel() == weights.numel() for t in tensors)
        target = 0
        if rounded is not None:
            assert rounded.is_contiguous() and rounded.dtype == torch.bfloat16 and rounded.device.type == "cpu"
            assert rounded.numel() == weights.numel()
            target = rounded.data_ptr()
        self._apply([t.data_ptr() for t in tensors], target, weights.numel(), gradient_factor, group, state["step"])

    def _apply(
        self, addresses: list[int], rounded: int, count: int, factor: float, group: dict[str, Any], step: int
    ) -> None:
        raise NotImplementedError


class HostAdamW(HostOptimizer):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        # Not used here, but CPUAdam needs it in a checkpoint.
        super().__init__(params, defaults | {"bias_correction": True})
        self._powers: dict[float, tuple[int, np.float32]] = {}

    def _apply(
        self, addresses: list[int], rounded: int, count: int, factor: float, group: dict[str, Any], step: int
    ) -> None:
        weights, gradients, momentum, variance = addresses
        beta1, beta2 = group["betas"]
        rate, one = np.float32(group["lr"]), np.float32(1)
        _native.adamw(
            weights,
            gradients,
            momentum,
            variance,
            rounded,
            count,
            factor,
            beta1,
            beta2,
            group["eps"],
            float(one / np.sqrt(one - self._power(beta2, step))),
            float(-rate / (one - self._power(beta1, step))),
            float(-rate * np.float32(group["weight_decay"])),
            torch.get_num_threads(),
        )

    def _power(self, beta: float, step: int) -> np.float32:
        """beta to the power of step, in fp32 with one product per step, as in CPUAdam (IncrementStep in cpu_adam.h)."""
        last, power = self._powers.get(beta, (0, np.float32(1)))
        if step == last + 1:
            power = power * np.float32(beta)
        elif step != last:
            power = np.float32(np.float64(np.float32(beta)) ** step)
        self._powers[beta] = step, power
        return power


class HostLion(HostOptimizer):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, program 1."""

    moments = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def _apply(
        self, addresses: list[int], rounded: int, count: int, factor: float, group: dict[str, Any], step: int
    ) -> None:
        weights, gradients, momentum = addresses
        beta1, beta2 = group["betas"]
        _native.lion(
            weights,
            gradients,
            momentum,
            rounded,
            count,
            factor,
            beta1,
            beta2,
            group["lr"],
            group["weight_decay"],
            torch.get_num_threads(),
        )
