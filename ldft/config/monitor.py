"""Sampling of memory and devices during a run."""

from __future__ import annotations

from dataclasses import dataclass

from ldft.errors import ConfigError

# A sample takes a few milliseconds; more than twenty per second would slow the run measurably.
_SHORTEST_S = 0.05


@dataclass(kw_only=True, slots=True)
class MonitorConfig:
    interval_s: float = 1.0
    """Seconds between samples of trace.parquet (memory over the run); 0: no trace. Not part of the run's identity."""

    def validate(self) -> None:
        """Raise ConfigError for values that are wrong on any machine."""
        if self.interval_s != 0 and self.interval_s < _SHORTEST_S:
            raise ConfigError(
                "monitor.interval_s",
                f"{self.interval_s:g} is too short; use {_SHORTEST_S} seconds or more, or 0 for no trace",
            )
