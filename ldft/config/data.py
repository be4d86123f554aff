"""The training tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ldft.errors import ConfigError


class DataKind(Enum):
    """random: fresh uniform tokens for each sample; zeros: token 0 everywhere; repeat: the first batch of `random` in every
    iteration; text: data.path, tokenized by data.tokenizer."""

    random = "random"
    zeros = "zeros"
    repeat = "repeat"
    text = "text"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    kind: DataKind = DataKind.random
    """Source of the tokens."""

    path: str = ""
    """data=text: a local .txt (one document), .jsonl (one object per line, key "text") or .parquet (column text)."""

    tokenizer: str = ""
    """data=text: a local folder with the model's tokenizer.json."""

    def validate(self) -> None:
        for key in ("path", "tokenizer"):
            value = getattr(self, key)
            if self.kind is DataKind.text and not value:
                what = "a .txt, .jsonl or .parquet file" if key == "path" else "a folder with a tokenizer.json"
                raise ConfigError(f"data.{key}", f"empty; data=text needs {what}")
            if self.kind is not DataKind.text and value:
                raise ConfigError(f"data.{key}", f"'{value}' is not read with data={self.kind.name}; use data=text")
