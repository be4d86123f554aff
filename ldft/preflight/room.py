"""What is left, or lacks, of both memories by the estimate, for choices that move bytes between them. Imports no torch.

The ranks take the parent's choices, so these use what does not change with use: the machine's size, not what is free now.
"""

from __future__ import annotations

from ldft import environment
from ldft.config import Config
from ldft.memory import limits
from ldft.preflight import device_estimate, host_estimate
from ldft.preflight.selection import Selection

# Estimates are a few percent off: of the GPU's memory this stays free, and this is added to the expected host memory.
DEVICE_SPARE, HOST_SPARE = 0.08, 0.02


def host_shortage(run: Selection) -> int:
    """Bytes of a host's ranks by which its memory is expected to fall short; 0: it suffices."""
    have = host_memory(run.config)
    return max(0, int(host_bytes(run) * (1 + HOST_SPARE)) - have) if have else 0


def host_bytes(run: Selection, device: device_estimate.Parts | None = None) -> int:
    """Expected host memory of a host's ranks. device: the device estimate at its peak, which is in host memory without a GPU."""
    roles, others = host_estimate.host_bytes(run), host_estimate.other_bytes(run, device or {})
    return run.config.launch.ranks_per_host * (sum(roles.values()) + sum(others.values()))


def host_memory(config: Config) -> int:
    """Bytes of host memory that all ranks may use, whether free now or not; 0 if unknown."""
    have = int((config.memory.capacity_gib or environment.assumed_host_gib() or 0) * 2**30)
    if environment.gpus_are_assumed():  # this machine's limits do not apply
        return have
    return limits.machine_memory(have or None)


def device_room(run: Selection, vram_gib: float, spare: float = DEVICE_SPARE) -> int:
    """Bytes of each GPU of this size that the run leaves free; below 0 if it lacks some. spare: part of its memory that no run may
    use."""
    peak = sum(device_estimate.peak_of(device_estimate.moments(run)).values())
    need = peak * (1 + device_estimate.FRAGMENTATION) + device_estimate.CONTEXT
    return int(vram_gib * 2**30 * (1 - spare) - need)
