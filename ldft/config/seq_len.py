"""Sequence length. Its options are names (4k), since Hydra cannot name an option by a bare number."""

from __future__ import annotations

from dataclasses import dataclass

from ldft.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class SeqLenConfig:
    tokens: int = 1024
    """Tokens per sequence; set any length of 2 or more with seq_len.tokens=."""

    def validate(self) -> None:
        if self.tokens < 2:
            raise ConfigError("seq_len.tokens", f"{self.tokens} is too short; a next-token loss needs 2 or more")
