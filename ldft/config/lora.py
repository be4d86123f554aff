"""Low-rank adapters, trained instead of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from ldft.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    rank: int = 0
    """Rank of the adapters; 0: no adapters, train every weight."""

    alpha: float = 0.0
    """Adapter outputs are scaled by alpha / rank; 0: twice the rank."""

    dropout: float = 0.0
    """Fraction of an adapter's inputs dropped in training."""

    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers with adapters, e.g. [q_proj,v_proj]; empty: every linear layer of attention and MLP. The weights
    of experts have no adapters."""

    def validate(self) -> None:
        if self.rank < 0:
            raise ConfigError("lora.rank", f"{self.rank} is negative; use 0 for none, or 1 or more")
        if not self.alpha >= 0:
            raise ConfigError("lora.alpha", f"{self.alpha:g} is negative; use 0 for twice the rank, or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError("lora.dropout", f"{self.dropout:g} is out of range; use 0 to below 1")
        for key in ("alpha", "dropout", "target_modules"):
            if getattr(self, key) and not self.rank:
                raise ConfigError(f"lora.{key}", f"{getattr(self, key)} has no effect without adapters; use lora=r16")
