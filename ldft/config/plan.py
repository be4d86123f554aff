"""Which values ldft chooses by itself, and what it aims at."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ldft.errors import ConfigError


class Goal(Enum):
    """auto: fastest for a single run on a GPU whose machine is measured and without a NUMA policy, else none. none: ldft changes
    nothing. fastest: the shortest time per token. longest: the longest sequence. leanest: the least host memory within 5% of the
    fastest."""

    auto = "auto"
    none = "none"
    fastest = "fastest"
    longest = "longest"
    leanest = "leanest"


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    goal: Goal = Goal.auto
    """What the chosen values aim at. Chosen are: what is offloaded, which layers are recomputed, where their inputs and attention
    outputs wait, tiles, and micro-batches; with longest also seq_len, and with several NUMA nodes the placement. Only values at
    their default are chosen."""

    tokens_per_update: int = 0
    """Tokens of all ranks between two updates, from which micro-batch size and accumulation are chosen; 0: as train.* say."""

    keep: list[str] = field(default_factory=list)
    """Groups and keys that stay as they are, although at their default. The command line adds what it sets."""

    def validate(self) -> None:
        if self.tokens_per_update < 0:
            raise ConfigError(
                "plan.tokens_per_update",
                f"{self.tokens_per_update} is negative; use 0 (as train.* say) or a number of tokens",
            )
        if self.tokens_per_update and self.goal is Goal.none:
            raise ConfigError(
                "plan.tokens_per_update",
                f"{self.tokens_per_update} is not used with plan=none; use train.micro_batch_size and "
                "train.gradient_accumulation_steps, or plan=fastest",
            )
