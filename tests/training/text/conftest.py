"""Files and tokenizers for the tests of text data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldft.config import Config, DataConfig, DataKind, DataLoss
from ldft.errors import ConfigError
from ldft.training.text import check, documents

WORDS = "a b c d e f g h i j"


@pytest.fixture
def words(word_tokenizer: Callable[..., Path]) -> Path:
    """A tokenizer folder whose ten tokens are words, with an end token of id 10."""
    return word_tokenizer(WORDS, end="</s>")


def config_of(path: Path, tokenizer: Path, kind: str = "text", **others: Any) -> Config:
    """A config with these data: a vocabulary of 16 tokens, sequences of 4."""
    made = Config()
    made.model.vocab_size, made.seq_len.tokens = 16, 4
    loss = DataLoss[others.pop("loss", "all")]
    made.data = DataConfig(kind=DataKind[kind], path=str(path), tokenizer=str(tokenizer), loss=loss, **others)
    return made


def refusal(path: Path, tokenizer: Path, kind: str = "text", **others: Any) -> str:
    """The line with which the parent refuses the data."""
    config = config_of(path, tokenizer, kind, **others)
    with pytest.raises(ConfigError) as raised:
        config.data.validate()
        check.check(config)
    line = str(raised.value)
    assert line.startswith("data.") and "\n" not in line and "; " in line, line
    return line


def contents(path: Path, column: str = "text", *, chat: bool = False) -> list[Any]:
    """What each document of a file holds."""
    return [document.content for document in documents.read(path, column, chat=chat)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
