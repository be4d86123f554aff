"""torch's history of CUDA memory for one iteration, in one file per rank; view it at https://pytorch.org/memory_viz."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ldft.config import Config

# Number of newest allocations and frees kept; each takes, with its Python stack, up to about 1 KiB in the file.
MAX_EVENTS = 100_000


def file_name(rank: int) -> str:
    return f"snapshot-{rank}.pickle"


@contextmanager
def recording(config: Config, folder: Path, iteration: int, rank: int) -> Iterator[None]:
    """If snapshot is set and this is the iteration to record, record its allocations and write them into `folder`. That iteration
    is the last warm-up one, so that no measured sample is slowed down; without warm-up, the last one."""
    chosen = (config.train.warmup_iterations or config.train.iterations) - 1
    if not config.snapshot or iteration != chosen:
        yield
        return
    # No stacks of frees: where a recomputation stops early, by an exception, torch (2.11) loses that exception while it notes the
    # stack of what is freed on the way ("returned NULL without setting an exception").
    torch.cuda.memory._record_memory_history(context="alloc", max_entries=MAX_EVENTS, stacks="python")
    try:
        yield
    finally:
        # Also after an out-of-memory error, when the history is most useful.
        torch.cuda.memory._dump_snapshot(str(folder / file_name(rank)))
        torch.cuda.memory._record_memory_history(enabled=None)
