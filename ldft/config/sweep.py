"""How a sweep's cells are planned and resumed. The grid is on the command line or, under hydra.sweeper, in conf/sweep."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import ConfigError


class Rerun(Enum):
    """missing: cells without a row or interrupted; failed: also error, oom, timeout and invalid; all: every cell again."""

    missing = "missing"
    failed = "failed"
    all = "all"


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    name: str = ""
    """Name of the sweep, kept in its rows; empty: derived from the cells."""

    repeats: int = 1
    """Runs of each cell, numbered by the key `repeat`; each pass over all cells ends before the next begins."""

    budget: int = 0
    """Number of grid cells to run, drawn at random (before repeats); 0: all cells."""

    budget_seed: int = 0
    """Seed of that draw: the same seed and grid give the same cells."""

    oom_backstop: bool = True
    """Skip a cell if the same cell with a shorter seq_len ran out of memory."""

    started_at: float = 0.0
    """When the sweep began, seconds since the epoch; set by the sweep itself, 0 in a single run."""

    def validate(self) -> None:
        if self.repeats < 1:
            raise ConfigError("sweep.repeats", f"{self.repeats} is too small; use 1 or more")
        if self.budget < 0:
            raise ConfigError(
                "sweep.budget", f"{self.budget} is negative; use the number of cells to run, or 0 for all"
            )
        if not self.started_at and (self.repeats > 1 or self.budget):
            key = "sweep.repeats" if self.repeats > 1 else "sweep.budget"
            raise ConfigError(key, "applies to sweeps only, and this is a single run; add -m")
        if "/" in self.name:
            raise ConfigError(
                "sweep.name", f"'{self.name}' contains a slash, but it becomes a file name; use a name without slashes"
            )
