"""How much to train and measure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import ConfigError


class Precision(Enum):
    """Data type of compute weights, gradients and activations. Master weights and moments are fp32. auto: the narrowest type that
    the device computes natively and that trains without tuning: bf16, on older GPUs fp16, else fp32."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    micro_batch_size: int = 1
    """Sequences per rank in each forward pass."""

    gradient_accumulation_steps: int = 1
    """Forward and backward passes before each update."""

    iterations: int = 5
    """Number of updates, including warm-up."""

    warmup_iterations: int = 2
    """Number of first iterations that are kept in the row but excluded from medians."""

    precision: Precision = Precision.auto
    """Compute precision; fp16 scales the loss. auto: bf16 on Ampere and later GPUs and on CPUs with bf16 instructions, fp16 on
    Volta and Turing, fp32 elsewhere; the row records the resolved value."""

    loss_scale: float = 0.0
    """fp16 only: fixed loss scale; 0: dynamic loss scaling (tuned by offload.deepspeed.fp16)."""

    seed: int = 0
    """Seed for weights and tokens."""

    def validate(self) -> None:
        for key in ("micro_batch_size", "gradient_accumulation_steps", "iterations"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key}", f"{getattr(self, key)} is too small; use 1 or more")
        if self.warmup_iterations < 0:
            raise ConfigError("train.warmup_iterations", f"{self.warmup_iterations} is negative; use 0 or more")
        if self.warmup_iterations >= self.iterations:
            raise ConfigError(
                "train.warmup_iterations",
                f"{self.warmup_iterations} leaves none of train.iterations={self.iterations} to measure; "
                "use fewer warm-up iterations or a larger train.iterations",
            )
        if not self.loss_scale >= 0:
            raise ConfigError(
                "train.loss_scale", f"{self.loss_scale:g} is negative; use 0 (dynamic) or a factor above 0"
            )
        if self.loss_scale and self.precision is not Precision.fp16:
            raise ConfigError(
                "train.loss_scale",
                f"{self.loss_scale:g} has no effect with train.precision={self.precision.name}; use fp16 or leave it at 0",
            )
        if not 0 <= self.seed < 2**31:
            raise ConfigError("train.seed", f"{self.seed} is out of range; use 0 to {2**31 - 1}")
