"""The tokens of an iteration. A sample depends only on its number, so that any number of ranks sees the same samples."""

from __future__ import annotations

import torch

from ldft.config import Config, DataKind
from ldft.training import text


def batch(config: Config, iteration: int, accumulation_step: int, rank: int) -> torch.Tensor:
    """Tokens of one micro-batch on the CPU: int64, shape (train.micro_batch_size, seq_len.tokens)."""
    micro, length = config.train.micro_batch_size, config.seq_len.tokens
    per_step = micro * config.launch.num_ranks
    if config.data.kind is DataKind.zeros:
        return torch.zeros(micro, length, dtype=torch.int64)
    if config.data.kind is DataKind.repeat:
        iteration = 0
    first = (iteration * config.train.gradient_accumulation_steps + accumulation_step) * per_step + rank * micro
    if config.data.kind is DataKind.text:
        samples_in_all = per_step * config.train.gradient_accumulation_steps * config.train.iterations
        ids = text.stream(config.data.path, config.data.tokenizer, config.model.vocab_size, samples_in_all * length)
        return torch.from_numpy(ids[first * length : (first + micro) * length].reshape(micro, length))
    generator = torch.Generator()
    samples = []
    for number in range(first, first + micro):
        generator.manual_seed(config.train.seed * 1_000_003 + number)
        samples.append(torch.randint(config.model.vocab_size, (length,), generator=generator))
    return torch.stack(samples)
