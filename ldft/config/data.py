"""The training tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import CombinationError, ConfigError


class DataKind(Enum):
    """random: fresh uniform tokens for each sample; zeros: token 0 everywhere; repeat: the first batch of `random` in every
    iteration; text: data.path, tokenized by data.tokenizer; chat: its conversations, through the tokenizer's chat template."""

    random = "random"
    zeros = "zeros"
    repeat = "repeat"
    text = "text"
    chat = "chat"


class DataLoss(Enum):
    """all: every token; assistant: the tokens of the assistant's turns."""

    all = "all"
    assistant = "assistant"


# What each kind that reads a file expects, and the column that it reads unless another is named.
_FILES = {DataKind.text: "a .txt, .jsonl or .parquet file", DataKind.chat: "a .jsonl or .parquet file"}
_COLUMNS = {DataKind.text: "text", DataKind.chat: "messages"}


@dataclass(kw_only=True, slots=True)
class DataConfig:
    kind: DataKind = DataKind.random
    """Source of the tokens."""

    path: str = ""
    """data=text: a local .txt (one document), .jsonl (one object per line) or .parquet. data=chat: a .jsonl or .parquet."""

    tokenizer: str = ""
    """data=text or chat: a local folder with the model's tokenizer.json; data=chat: and its chat template."""

    column: str = ""
    """Key of .jsonl, or column of .parquet, that holds the documents. Empty: text with data=text, messages with data=chat."""

    loss: DataLoss = DataLoss.all
    """Tokens whose prediction counts in the loss; assistant needs data=chat."""

    @property
    def reads_file(self) -> bool:
        return self.kind in _FILES

    @property
    def column_read(self) -> str:
        """The column with the documents, where the kind reads a file."""
        return self.column or _COLUMNS[self.kind]

    def validate(self) -> None:
        for key in ("path", "tokenizer", "column"):
            value = getattr(self, key)
            if self.reads_file and not value and key != "column":
                what = _FILES[self.kind] if key == "path" else "a folder with a tokenizer.json"
                raise ConfigError(f"data.{key}", f"empty; data={self.kind.name} needs {what}")
            if not self.reads_file and value:
                raise ConfigError(
                    f"data.{key}", f"'{value}' is not read with data={self.kind.name}; use data=text or data=chat"
                )
        if self.loss is DataLoss.assistant and self.kind is not DataKind.chat:
            raise CombinationError(
                "data.loss", f"assistant: data={self.kind.name} has no assistant; use data=chat or data.loss=all"
            )
