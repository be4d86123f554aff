"""Waits for host memory that what ran before is still giving back: unpinning and freeing 100 GiB takes the kernel a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from ldft.memory.limits import machine_memory
from ldft.preflight import fit
from ldft.preflight.resolved import Resolved

LIMIT_S, _INTERVAL_S = 60.0, 1.0
# Less than this in one interval: nothing is being given back.
_GROWS_BYTES = 64 << 20


def until_it_fits(run: Resolved, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Check that the run fits; as long as what is missing grows by itself, wait, at most LIMIT_S. Returns a note if it waited.

    Raises DoesNotFitError.
    """
    waited = 0.0
    while True:
        free = fit.available(run.config).bytes
        try:
            fit.check(run)
        except fit.DoesNotFitError as error:
            capacity = int(run.config.memory.capacity_gib * fit.GIB) or None
            never = run.estimate.host_bytes > machine_memory(capacity)
            if error.of_device or never or waited >= LIMIT_S:
                raise
            sleep(_INTERVAL_S)
            waited += _INTERVAL_S
            if fit.available(run.config).bytes - free < _GROWS_BYTES:
                fit.check(run)
                return _note(waited)
        else:
            return _note(waited) if waited else None


def _note(waited: float) -> str:
    return f"waited {waited:.0f} s until the host had the memory back that other processes held"
