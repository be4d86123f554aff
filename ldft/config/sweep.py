"""How a batch of cells is planned and resumed. The grid itself is on the command line or, under hydra.sweeper, in conf/sweep."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import ConfigError


class Rerun(Enum):
    """missing: cells without a row or interrupted; failed: also error, oom, timeout and invalid; all: every cell once more."""

    missing = "missing"
    failed = "failed"
    all = "all"


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    name: str = ""
    """Name of the sweep, kept in its rows; empty: made from the cells."""

    repeats: int = 1
    """Runs of each cell, numbered by the key `repeat`; one pass over all cells, then the next."""

    budget: int = 0
    """Cells of the grid to run, drawn at random (before repeats); 0 is all of them."""

    budget_seed: int = 0
    """Seed of that draw: the same seed and grid give the same cells."""

    oom_backstop: bool = True
    """Skip a cell where one that differs in nothing but a shorter seq_len ran out of memory."""

    started_at: float = 0.0
    """When the sweep began, seconds since the epoch; set by the sweep itself, 0 in a single run."""

    def validate(self) -> None:
        if self.repeats < 1:
            raise ConfigError("sweep.repeats", f"{self.repeats} is too small; use 1 or more")
        if self.budget < 0:
            raise ConfigError("sweep.budget", f"{self.budget} is negative; use a number of cells, or 0 for all")
        if not self.started_at and (self.repeats > 1 or self.budget):
            key = "sweep.repeats" if self.repeats > 1 else "sweep.budget"
            raise ConfigError(key, "it is for sweeps, and this is a single run; add -m")
        if "/" in self.name:
            raise ConfigError("sweep.name", f"'{self.name}' names a file of the results folder; use no slash")
