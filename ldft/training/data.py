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
class Part:
    """One rank's part of sequences that several ranks share."""

    positions: torch.Tensor
    """int64, shape of the rank's tokens: their places in the sequence."""

    next_labels: torch.Tensor
    """The label of each token's successor, which may be another rank's; IGNORED for the last."""

    counted: torch.Tensor
    """fp32, no dimension: the labels that count in the whole micro-batch, divided by the ranks that share it. A rank's loss is the
    sum over its tokens divided by this; so the mean over the ranks, as ZeRO-3 takes it of gradients, is that over all tokens."""

    def to(self, device: torch.device) -> Part:
        return Part(self.positions.to(device), self.next_labels.to(device), self.counted.to(device))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    tokens: torch.Tensor
    """int64, shape (train.micro_batch_size, seq_len.tokens)."""

    labels: torch.Tensor
    """The tokens, with IGNORED for those that are not trained on."""

    weight: float = 1.0
    """Factor of its mean loss that makes every token of the iteration count alike, whichever micro-batch it is in."""

    part: Part | None = None
    """Where ranks share the sequences; tokens and labels are then those of this rank."""

    def to(self, device: torch.device) -> MicroBatch:
        tokens = self.tokens.to(device)
        labels = tokens if self.labels is self.tokens else self.labels.to(device)
        return MicroBatch(tokens, labels, self.weight, self.part.to(device) if self.part else None)

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        found: dict[str, Any] = {"input_ids": self.tokens, "labels": self.labels}
        if self.part:
            found |= {"position_ids": self.part.positions, "shift_labels": self.part.next_labels}
            found["num_items_in_batch"] = self.part.counted
        return found

    def weighted(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.weight == 1.0 else loss * self.weight


def micro_batch(config: Config, iteration: int, accumulation_step: int, rank: int) -> MicroBatch:
    """The tokens and labels of one micro-batch, or of the rank's part of it, on the CPU."""
    group, place = divmod(rank, config.launch.sequence_parallel)
    whole = _whole(config, iteration, accumulation_step, group)
    return whole if config.launch.sequence_parallel == 1 else _part(whole, place, config.launch.sequence_parallel)


def _whole(config: Config, iteration: int, accumulation_step: int, group: int) -> MicroBatch:
    tokens = batch(config, iteration, accumulation_step, group)
    if config.data.loss is DataLoss.all:
        return MicroBatch(tokens, tokens)
    micro = config.train.micro_batch_size
    first = _first_sample(config, iteration, accumulation_step, group)
    trained = torch.from_numpy(_trained(config)[first : first + micro])
    batches = config.train.gradient_accumulation_steps * config.launch.data_parallel
    weight = _counted(trained) * batches / loss_tokens(config, iteration)
    return MicroBatch(tokens, tokens.masked_fill(~trained, IGNORED), weight)


def _part(whole: MicroBatch, place: int, parts: int) -> MicroBatch:
    """The part at `place` of a micro-batch. Labels move to their predecessors before it is cut."""
    sequences, length = whole.tokens.shape
    size = length // parts
    mine = slice(place * size, (place + 1) * size)
    next_labels = torch.nn.functional.pad(whole.labels, (0, 1), value=IGNORED)[:, 1:]
    counted = torch.tensor(float((next_labels != IGNORED).sum()) / parts)
    positions = torch.arange(length).expand(sequences, -1)[:, mine]
    tokens, labels = (one[:, mine].contiguous() for one in (whole.tokens, whole.labels))
    return MicroBatch(
        tokens, labels, whole.weight, Part(positions.contiguous(), next_labels[:, mine].contiguous(), counted)
    )


def batch(config: Config, iteration: int, accumulation_step: int, group: int) -> torch.Tensor:
    """Tokens of one micro-batch of a rank, or of a group of ranks that share sequences, on the CPU: int64, shape
    (train.micro_batch_size, seq_len.tokens)."""
    micro, length = config.train.micro_batch_size, config.seq_len.tokens
    if config.data.kind is DataKind.zeros:
        return torch.zeros(micro, length, dtype=torch.int64)
    if config.data.kind is DataKind.repeat:
        iteration = 0
    first = _first_sample(config, iteration, accumulation_step, group)
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
    samples = config.sequences_per_update
    if config.data.loss is DataLoss.all:
        return samples * (config.seq_len.tokens - 1)
    return _counted(torch.from_numpy(_trained(config)[iteration * samples : (iteration + 1) * samples]))


def read(config: Config) -> dict[str, Any]:
    """Read the run's tokens from data.path, and return the row's columns about it. Raises ConfigError."""
    packed = _packed(config)
    return {name: getattr(packed, name) for name in ("documents_read", "documents_skipped", "sequences_skipped")}


def _first_sample(config: Config, iteration: int, accumulation_step: int, group: int) -> int:
    micro, groups = config.train.micro_batch_size, config.launch.data_parallel
    return iteration * config.sequences_per_update + (accumulation_step * groups + group) * micro


def _packed(config: Config) -> packing.Packed:
    sequences = config.sequences_per_update * config.train.iterations
    return packing.pack(packing.Source.of(config), sequences, config.seq_len.tokens)


def _trained(config: Config) -> Any:
    trained = _packed(config).trained
    assert trained is not None
    return trained


def _counted(trained: torch.Tensor) -> int:
    return int(trained[:, 1:].sum())
