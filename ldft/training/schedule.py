"""Learning-rate schedules, without torch. Same shapes as transformers' get_scheduler, over train.iterations updates."""

from __future__ import annotations

import math

from ldft.config import Config, Schedule


def factor(config: Config, update: int) -> float:
    """Factor on optimizer.learning_rate in an update (counted from 0)."""
    warmup, total = config.optimizer.schedule_warmup, config.train.iterations
    if update < warmup:
        return update / warmup
    if config.optimizer.schedule is Schedule.constant:
        return 1.0
    left = max(0.0, (total - update) / max(1, total - warmup))
    if config.optimizer.schedule is Schedule.linear:
        return left
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
