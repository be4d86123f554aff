"""torch's history of CUDA memory for one iteration, in a file a rank that https://pytorch.org/memory_viz draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ldft.config import Config

# Allocations and frees, the newest ones; each with its Python stack takes up to about 1 KiB in the file.
MAX_EVENTS = 100_000


def file_name(rank: int) -> str:
    return f"snapshot-{rank}.pickle"


@contextmanager
def recording(config: Config, folder: Path, iteration: int, rank: int) -> Iterator[None]:
    """Where snapshot is set, record what this iteration allocates and write it into `folder`, if it is the one to record: the
    last of the warm-up, so that no sample that counts is slowed down, and without warm-up the last of all."""
    chosen = (config.train.warmup_iterations or config.train.iterations) - 1
    if not config.snapshot or iteration != chosen:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS, stacks="python")
    try:
        yield
    finally:
        # Also after an out-of-memory, which is when one wants to look.
        torch.cuda.memory._dump_snapshot(str(folder / file_name(rank)))
        torch.cuda.memory._record_memory_history(enabled=None)
