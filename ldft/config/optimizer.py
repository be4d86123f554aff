"""The optimizer and its hyperparameters; the defaults are the seed repository's."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ldft.errors import ConfigError


class Schedule(Enum):
    """Learning rate after warm-up. constant: unchanged; linear: falls linearly to 0; cosine: falls to 0 along half a cosine."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    name: str = "adamw"
    """Update rule: adamw or lion."""

    learning_rate: float = 1e-4
    """Peak learning rate."""

    schedule: Schedule = Schedule.constant
    """Learning-rate schedule over train.iterations."""

    schedule_warmup: int = 0
    """Updates over which the learning rate rises linearly from 0 to optimizer.learning_rate."""

    weight_decay: float = 0.01
    """Decoupled weight decay, per step and unit of learning rate."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and second moment."""

    eps: float = 1e-8
    """Added to the square root of the second moment; unused by lion, which has none."""

    gradient_clipping: float = 0.9
    """Largest global L2 norm of the gradient; 0 turns clipping off."""

    fused_step: bool | None = None
    """true: ldft's kernel updates offloaded weights and unscales, clips and rounds in the same pass over memory; false: DeepSpeed's
    CPUAdam or CPULion, with separate torch passes. null: true if all optimizer state is fp32 in host memory and DeepSpeed
    does not move it itself."""

    overlap_step: bool | None = None
    """true: the fused step updates offloaded weights beside the next forward pass, which waits for each weight that it needs;
    false: within the step. The results are the same bit for bit. null: true on GPUs, where all weights and their optimizer state
    are in host memory and every weight is trained."""

    def validate(self) -> None:
        if self.name not in ("adamw", "lion"):
            raise ConfigError("optimizer.name", f"'{self.name}' does not exist; use adamw or lion")
        if not self.learning_rate > 0:
            raise ConfigError(
                "optimizer.learning_rate", f"{self.learning_rate:g} is not positive; use a number above 0"
            )
        if self.schedule_warmup < 0:
            raise ConfigError("optimizer.schedule_warmup", f"{self.schedule_warmup} is negative; use 0 or more updates")
        for key in ("weight_decay", "eps", "gradient_clipping"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"optimizer.{key}", f"{getattr(self, key):g} is negative; use 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                "optimizer.betas", f"{list(self.betas)} is not two numbers in [0, 1); use e.g. [0.9,0.95]"
            )
