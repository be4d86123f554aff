"""The tokens of an iteration. A sample depends only on its number, so that any number of ranks sees the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldft.config import Config, DataKind, DataLoss
from ldft.training.text import packing

# The label of a token whose prediction does not count in the loss; transformers and Liger leave it out.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    tokens: torch.Tensor
    """int64, shape (train.micro_batch_size, seq_len.tokens)."""

    labels: torch.Tensor
    """The tokens, with IGNORED for those that are not trained on."""

    weight: float = 1.0
    """Factor of its mean loss that makes every token of the iteration count alike, whichever micro-batch it is in."""

    def to(self, device: torch.device) -> MicroBatch:
        tokens = self.tokens.to(device)
        return MicroBatch(tokens, tokens if self.labels is self.tokens else self.labels.to(device), self.weight)

    def weighted(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.weight == 1.0 else loss * self.weight


def micro_batch(config: Config, iteration: int, accumulation_step: int, rank: int) -> MicroBatch:
    """The tokens and labels of one micro-batch, on the CPU."""
    tokens = batch(config, iteration, accumulation_step, rank)
    if config.data.loss is DataLoss.all:
        return MicroBatch(tokens, tokens)
    micro = config.train.micro_batch_size
    first = _first_sample(config, iteration, accumulation_step, rank)
    trained = torch.from_numpy(_trained(config)[first : first + micro])
    batches = config.train.gradient_accumulation_steps * config.launch.num_ranks
    weight = _counted(trained) * batches / loss_tokens(config, iteration)
    return MicroBatch(tokens, tokens.masked_fill(~trained, IGNORED), weight)


def batch(config: Config, iteration: int, accumulation_step: int, rank: int) -> torch.Tensor:
    """Tokens of one micro-batch on the CPU: int64, shape (train.micro_batch_size, seq_len.tokens)."""
    micro, length = config.train.micro_batch_size, config.seq_len.tokens
    if config.data.kind is DataKind.zeros:
        return torch.zeros(micro, length, dtype=torch.int64)
    if config.data.kind is DataKind.repeat:
        iteration = 0
    first = _first_sample(config, iteration, accumulation_step, rank)
    if config.data.reads_file:
        return torch.from_numpy(_packed(config).tokens[first : first + micro])
    generator = torch.Generator()
    samples = []
    for number in range(first, first + micro):
        generator.manual_seed(config.train.seed * 1_000_003 + number)
        samples.append(torch.randint(config.model.vocab_size, (length,), generator=generator))
    return torch.stack(samples)


def loss_tokens(config: Config, iteration: int) -> int:
    """Tokens whose prediction counts in an iteration's loss, over all ranks and accumulation steps. The first token of a sequence
    is predicted from nothing."""
    samples = _samples(config)
    if config.data.loss is DataLoss.all:
        return samples * (config.seq_len.tokens - 1)
    return _counted(torch.from_numpy(_trained(config)[iteration * samples : (iteration + 1) * samples]))


def read(config: Config) -> dict[str, Any]:
    """Read the run's tokens from data.path, and return the row's columns about it. Raises ConfigError."""
    packed = _packed(config)
    return {name: getattr(packed, name) for name in ("documents_read", "documents_skipped", "sequences_skipped")}


def _samples(config: Config) -> int:
    """Sequences of one iteration, over all ranks and accumulation steps."""
    return config.train.micro_batch_size * config.train.gradient_accumulation_steps * config.launch.num_ranks


def _first_sample(config: Config, iteration: int, accumulation_step: int, rank: int) -> int:
    micro, ranks = config.train.micro_batch_size, config.launch.num_ranks
    return iteration * _samples(config) + (accumulation_step * ranks + rank) * micro


def _packed(config: Config) -> packing.Packed:
    sequences = _samples(config) * config.train.iterations
    return packing.pack(packing.Source.of(config), sequences, config.seq_len.tokens)


def _trained(config: Config) -> Any:
    trained = _packed(config).trained
    assert trained is not None
    return trained


def _counted(trained: torch.Tensor) -> int:
    return int(trained[:, 1:].sum())
