"""Number of worker processes and of their hosts, their device and their time limit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import ConfigError


class Device(Enum):
    """auto is cuda when the machine has an NVIDIA GPU, else cpu."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    num_ranks: int = 1
    """Worker processes; on cuda, one per GPU (the seed's NUM_GPUS)."""

    num_hosts: int = 1
    """Hosts that share the ranks evenly: of a SLURM allocation, or as NODE_RANK and the like say (docs/slurm.md)."""

    sequence_parallel: int = 1
    """Ranks that share each sequence (Ulysses): each has a part of its tokens and, in attention, of the heads."""

    device: Device = Device.auto
    """Device type of every rank."""

    timeout_s: float = 0.0
    """Seconds until the ranks are stopped and the row gets status timeout; 0: no limit. Not part of the run's identity."""

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that have sequences of their own; also of a number that validate() refuses, whose run has a row, too."""
        return self.num_ranks // max(1, self.sequence_parallel)

    @property
    def ranks_per_host(self) -> int:
        return self.num_ranks // max(1, self.num_hosts)

    def validate(self) -> None:
        if self.num_ranks < 1:
            raise ConfigError("launch.num_ranks", f"{self.num_ranks} is too small; use 1 or more")
        if self.num_hosts < 1 or self.num_ranks % self.num_hosts:
            raise ConfigError(
                "launch.num_hosts", f"{self.num_hosts} does not divide launch.num_ranks={self.num_ranks}; use a divisor"
            )
        if self.sequence_parallel < 1:
            raise ConfigError("launch.sequence_parallel", f"{self.sequence_parallel} is too small; use 1 or more")
        if rest := self.num_ranks % self.sequence_parallel:
            raise ConfigError(
                "launch.sequence_parallel",
                f"{self.sequence_parallel} does not divide launch.num_ranks={self.num_ranks}; use a divisor, or "
                f"launch.num_ranks={self.num_ranks - rest + self.sequence_parallel}",
            )
        if self.timeout_s < 0:
            raise ConfigError(
                "launch.timeout_s", f"{self.timeout_s:g} is negative; use seconds above 0, or 0 for no limit"
            )
