"""What tokens the model sees."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DataKind(Enum):
    """random: fresh uniform tokens for each sample; repeat: the first batch of `random`, again in each iteration."""

    random = "random"
    repeat = "repeat"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    kind: DataKind = DataKind.random
    """Source of the tokens."""
