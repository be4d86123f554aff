"""Batches: the same samples however they are split over ranks, and a loss in which every trained token counts alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldft.config import Config, DataConfig, DataKind, DataLoss
from ldft.training import data
from ldft.training.text import chat

DOCUMENTS = ["a b c", "d e", "f g h i j"]
WORDS = "a b c d e f g h i j"


@pytest.fixture
def config(tmp_path: Path, word_tokenizer: Callable[..., Path]) -> Config:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": doc, "n": 1}) + "\n" for doc in DOCUMENTS))
    made = Config()
    made.data = DataConfig(
        kind=DataKind.text, path=str(tmp_path / "docs.jsonl"), tokenizer=str(word_tokenizer(WORDS, end="</s>"))
    )
    made.seq_len.tokens = 4
    return made


def splits(config: Config) -> Iterator[list[data.MicroBatch]]:
    """The micro-batches of two iterations of eight samples, split in several ways over ranks, micro-batches and steps."""
    for ranks, micro, steps in ((1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)):
        config.launch.num_ranks = ranks
        config.train.micro_batch_size, config.train.gradient_accumulation_steps = micro, steps
        order = [(i, step, rank) for i in range(2) for step in range(steps) for rank in range(ranks)]
        yield [data.micro_batch(config, *which) for which in order]


def test_documents_are_packed_with_their_end_token_and_read_again(config: Config) -> None:
    config.train.iterations = 5
    got = torch.cat([data.batch(config, iteration, 0, 0).flatten() for iteration in range(5)]).tolist()
    once = [0, 1, 2, 10, 3, 4, 10, 5, 6, 7, 8, 9, 10]
    assert got == (once * 2)[:20]
    assert data.read(config) == {"documents_read": 3, "documents_skipped": 0, "sequences_skipped": 0}


@pytest.mark.parametrize("kind", ["text", "random"])
def test_any_split_over_ranks_sees_the_same_samples(config: Config, kind: str) -> None:
    if kind == "random":
        config.data = DataConfig()
    whole = None
    for batches in splits(config):
        rows = torch.cat([batch.tokens for batch in batches]).tolist()
        whole = whole or rows
        assert rows == whole and len({tuple(row) for row in rows}) > 4
        assert all(batch.labels is batch.tokens and batch.weight == 1.0 for batch in batches)
        assert data.loss_tokens(config, 1) == 8 * 3


def test_zeros_and_repeat() -> None:
    config = Config()
    config.seq_len.tokens = 4
    config.data.kind = DataKind.zeros
    assert data.batch(config, 3, 0, 0).tolist() == [[0, 0, 0, 0]]
    config.data.kind = DataKind.repeat
    assert torch.equal(data.batch(config, 0, 0, 0), data.batch(config, 3, 0, 0))
    config.data.kind = DataKind.random
    assert not torch.equal(data.batch(config, 0, 0, 0), data.batch(config, 3, 0, 0))


def test_every_token_of_the_assistant_counts_alike_whatever_the_split(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uneven turns: the mean of each micro-batch's mean, as DeepSpeed takes it, would weigh tokens of short answers more."""
    folder = Path(config.data.tokenizer)
    template = "{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' </s> ' }}"
    template += "{% endgeneration %}{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    chats = [
        [{"role": "user", "content": "a b"[: 1 + 2 * (n % 2)]}, {"role": "assistant", "content": WORDS[: 1 + 2 * n]}]
        for n in range(8)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats))
    config.data = DataConfig(
        kind=DataKind.chat, path=str(tmp_path / "chat.jsonl"), tokenizer=str(folder), loss=DataLoss.assistant
    )
    config.train.iterations = 2
    config.train.warmup_iterations = 1
    values = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    for batches in splits(config):
        means = []
        for batch in batches:
            counted = batch.labels[:, 1:][batch.labels[:, 1:] != data.IGNORED]
            assert len(counted) and torch.equal(
                batch.tokens[batch.labels != data.IGNORED], batch.labels[batch.labels >= 0]
            )
            means.append(batch.weighted(values[counted].mean()))
        half = len(means) // 2
        losses = [torch.stack(means[:half]).mean().item(), torch.stack(means[half:]).mean().item()]
        labels = torch.cat([batch.labels for batch in batches[:half]])[:, 1:]
        assert (labels != data.IGNORED).sum() == data.loss_tokens(config, 0)
        assert losses[0] == pytest.approx(values[labels[labels >= 0]].mean().item())
        seen.append(losses)
    assert all(losses == pytest.approx(seen[0]) for losses in seen) and seen[0][0] != seen[0][1]
    assert chat._GENERATION.search(template)
