"""The host-memory policy: on which NUMA nodes the run's bytes are put."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class NumaConfig:
    name: str = "default"
    """Name of the policy; default inherits the caller's, so `numactl ... python -m ldft` works."""
