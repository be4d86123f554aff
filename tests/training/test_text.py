"""Text data: the same tokens from every file kind, packed, and the same samples however they are split over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ldft.config import Config, DataConfig, DataKind
from ldft.errors import ConfigError
from ldft.training import data, text

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


def test_documents_are_packed_with_their_end_token_and_read_again(config: Config) -> None:
    config.train.iterations = 5
    got = torch.cat([data.batch(config, iteration, 0, 0).flatten() for iteration in range(5)]).tolist()
    once = [0, 1, 2, 10, 3, 4, 10, 5, 6, 7, 8, 9, 10]
    assert got == (once * 2)[:20]


def test_parquet_and_jsonl_say_the_same_and_txt_is_one_document(config: Config, tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2, 3], "text": DOCUMENTS}), tmp_path / "docs.parquet")
    (tmp_path / "docs.txt").write_text("\n".join(DOCUMENTS))

    def stream(path: str) -> list[int]:
        return text.stream(path, config.data.tokenizer, 16, 13).tolist()

    assert stream(str(tmp_path / "docs.parquet")) == stream(config.data.path)
    assert stream(str(tmp_path / "docs.txt"))[:11] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("kind", ["text", "random"])
def test_any_split_over_ranks_sees_the_same_samples(config: Config, kind: str) -> None:
    if kind == "random":
        config.data = DataConfig()

    def samples(ranks: int, micro: int, steps: int) -> list:
        config.launch.num_ranks, config.train.micro_batch_size, config.train.gradient_accumulation_steps = (
            ranks,
            micro,
            steps,
        )
        return [
            row
            for iteration in range(2)
            for step in range(steps)
            for rank in range(ranks)
            for row in data.batch(config, iteration, step, rank).tolist()
        ]

    whole = samples(1, 8, 1)
    assert len({tuple(row) for row in whole}) > 4
    for split in ((2, 4, 1), (4, 2, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)):
        assert samples(*split) == whole, split


def test_a_long_line_less_file_is_cut_without_losing_tokens(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_text("".join(f"{word}\n" for word in (WORDS.split() * 50)))
    whole = text.stream(str(tmp_path / "long.txt"), config.data.tokenizer, 16, 500).tolist()
    text.stream.cache_clear()
    monkeypatch.setattr(text, "_PIECE_BYTES", 7)
    assert (
        text.stream(str(tmp_path / "long.txt"), config.data.tokenizer, 16, 500).tolist()
        == whole
        == list(range(10)) * 50
    )


def test_zeros_and_repeat() -> None:
    config = Config()
    config.seq_len.tokens = 4
    config.data.kind = DataKind.zeros
    assert data.batch(config, 3, 0, 0).tolist() == [[0, 0, 0, 0]]
    config.data.kind = DataKind.repeat
    assert torch.equal(data.batch(config, 0, 0, 0), data.batch(config, 3, 0, 0))
    config.data.kind = DataKind.random
    assert not torch.equal(data.batch(config, 0, 0, 0), data.batch(config, 3, 0, 0))


def test_a_text_without_tokens_is_refused(config: Config, tmp_path: Path, word_tokenizer: Callable[..., Path]) -> None:
    (tmp_path / "blank.txt").write_text("  \n")
    with pytest.raises(ConfigError, match=r"data.path: .*blank.txt' gives no tokens"):
        text.stream(str(tmp_path / "blank.txt"), str(word_tokenizer("a b")), 16, 4)
