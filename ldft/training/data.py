"""The tokens of an iteration. A sample depends on its number alone, so that any split over ranks sees the same samples."""

from __future__ import annotations

import torch

from ldft.config import Config, DataKind


def batch(config: Config, iteration: int, accumulation_step: int, rank: int) -> torch.Tensor:
    """Tokens of one micro-batch on the CPU: int64, shape (train.micro_batch_size, seq_len.tokens)."""
    micro = config.train.micro_batch_size
    per_step = micro * config.launch.num_ranks
    if config.data.kind is DataKind.repeat:
        iteration = 0
    first = (iteration * config.train.gradient_accumulation_steps + accumulation_step) * per_step + rank * micro
    generator = torch.Generator()
    samples = []
    for number in range(first, first + micro):
        generator.manual_seed(config.train.seed * 1_000_003 + number)
        samples.append(torch.randint(config.model.vocab_size, (config.seq_len.tokens,), generator=generator))
    return torch.stack(samples)
