"""AdamW and Lion over fp32 weights in host memory, in native code (csrc/update.cpp): one pass that includes scaling the gradient
and writing the copy of the weights in the precision of the computation. Gradients may be in 16 bits.

On CPUs with FMA, results equal those of DeepSpeed's CPUAdam and CPULion bit for bit (CPULion from 0.19.8 on: before, its vector
code took steps of other sizes). State and groups have the same names, so that checkpoints are interchangeable. Nothing is compiled
at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ldft import _native

_TYPES = {
    torch.float32: _native.Type.fp32,
    torch.bfloat16: _native.Type.bf16,
    torch.float16: _native.Type.fp16,
}


@dataclass(frozen=True, slots=True)
class Task:
    """One step of one parameter, or of a part of a flat tensor: the scalars of this step and the addresses."""

    arguments: tuple[Any, ...]
    """For `add` of _native.Update."""
    tensors: tuple[torch.Tensor, ...]
    """The memory that it reads and writes."""


class HostOptimizer(torch.optim.Optimizer):
    """Common part of both: parameters and state are contiguous fp32 tensors, gradients fp32, bf16 or fp16. A parameter on a GPU is
    updated there, with the same roundings."""

    moments: ClassVar[tuple[str, ...]]
    """Names of the state tensors."""
    device_rule: ClassVar[str]
    """Name of the rule in device_update.py."""
    _native_rule: ClassVar[Any]
    fp32_optimizer_states = True  # the name in DeepSpeed's optimizers

    @torch.no_grad()
    def step(self, closure: Any = None, into: list[Task] | None = None, **more: Any) -> None:  # type: ignore[override]  # no closure, and no loss to return
        """Update every parameter that has a gradient; with `into`, put the tasks there instead. more: arguments of `tasks`. Takes
        no closure."""
        assert closure is None
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                if weights.is_cuda:
                    self._update_on_device(weights, group, **more)
                else:
                    found = self.tasks(weights, group, **more)
                    if into is None:
                        run(found)
                    else:
                        into += found

    def tasks(
        self,
        weights: torch.Tensor,
        group: dict[str, Any],
        gradient_factor: float = 1.0,
        copy: torch.Tensor | None = None,
        parts: Sequence[int] | None = None,
    ) -> list[Task]:
        """Count one more step of a parameter, and return the work of this step with its group's hyperparameters of now.

        gradient_factor: factor applied to the gradient first; `weights.grad` itself is unchanged. copy: CPU tensor with as many
        elements, which receives the new weights in its precision. parts: numbers of elements of consecutive parts, each of which
        becomes a task; by default one task.
        """
        state = self._next_state(weights)
        gradients, moments = weights.grad, [state[name] for name in self.moments]
        assert gradients is not None
        for tensor in (weights, *moments):
            assert tensor.dtype == torch.float32
        tensors = (weights, gradients, *moments, *(() if copy is None else (copy,)))
        assert all(t.is_contiguous() and t.device.type == "cpu" and t.numel() == weights.numel() for t in tensors)
        parts = [weights.numel()] if parts is None else parts
        assert sum(parts) == weights.numel()
        rule = self._native_rule(*self._scalars(gradient_factor, group, state["step"]))
        momentum, variance = (*moments, None)[:2]
        found, offset = [], 0
        for count in parts:
            found.append(
                Task(
                    (
                        rule,
                        _address(weights, offset),
                        _address(gradients, offset),
                        _TYPES[gradients.dtype],
                        _address(momentum, offset),
                        _address(variance, offset),
                        _address(copy, offset),
                        _TYPES[torch.float32 if copy is None else copy.dtype],
                        count,
                    ),
                    tensors,
                )
            )
            offset += count
        return found

    def _update_on_device(
        self,
        weights: torch.Tensor,
        group: dict[str, Any],
        gradient_factor: float = 1.0,
        copy: torch.Tensor | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        """Launch one step of a parameter on its GPU; arguments as of `tasks`, parts do not matter."""
        from ldft.training.optimizers import device_update  # Triton exists for GPUs only

        state = self._next_state(weights)
        moments = [state[name] for name in self.moments]
        rule = getattr(device_update, self.device_rule)
        rule(weights, weights.grad, *moments, copy, *self._scalars(gradient_factor, group, state["step"]))

    def _next_state(self, weights: torch.Tensor) -> dict[str, Any]:
        """A parameter's state, with one more step counted."""
        state: dict[str, Any] = self.state[weights]
        state.setdefault("step", 0)
        for name in self.moments:
            if name not in state:
                state[name] = torch.zeros_like(weights)
        state["step"] += 1
        return state

    def _scalars(self, factor: float, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The scalars of a step, in the order of the native rule's."""
        raise NotImplementedError


def _address(tensor: torch.Tensor | None, offset: int) -> int:
    return 0 if tensor is None else tensor.data_ptr() + offset * tensor.element_size()


def run(tasks: Sequence[Task]) -> Any:
    """Do the tasks with as many threads as torch uses, this one included. Returns the ended _native.Update."""
    update = prepared(tasks)
    update.start(torch.get_num_threads() - 1, 0)
    update.finish()
    return update


def prepared(tasks: Sequence[Task]) -> Any:
    """The _native.Update of these tasks, which get the numbers 0, 1, ...; not started yet."""
    update = _native.Update([task.tensors for task in tasks])
    for task in tasks:
        update.add(*task.arguments)
    return update


class HostAdamW(HostOptimizer):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2."""

    moments = ("exp_avg", "exp_avg_sq")
    device_rule, _native_rule = "adamw", _native.AdamW

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

    def _scalars(self, factor: float, group: dict[str, Any], step: int) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        rate, one = np.float32(group["lr"]), np.float32(1)
        return (
            factor,
            beta1,
            beta2,
            group["eps"],
            float(one / np.sqrt(one - self._power(beta2, step))),
            float(-rate / (one - self._power(beta1, step))),
            float(-rate * np.float32(group["weight_decay"])),
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
    device_rule, _native_rule = "lion", _native.Lion

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def _scalars(self, factor: float, group: dict[str, Any], step: int) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return factor, beta1, beta2, group["lr"], group["weight_decay"]
