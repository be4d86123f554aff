"""Documents packed into sequences of one length, end to end, without padding. A file that is too short is read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ldft import files
from ldft.config import Config, DataKind, DataLoss
from ldft.errors import ConfigError
from ldft.training.text import documents, tokenizer_folder
from ldft.training.text.chat import ChatTemplate
from ldft.training.text.documents import Document

if TYPE_CHECKING:
    import numpy as np

# The ids of a document, and for each whether it is trained on; None: all are.
Encode = Callable[[Document], tuple[list[int], list[bool] | None]]


@dataclass(frozen=True, slots=True)
class Source:
    """What is read, and how."""

    path: Path
    column: str
    tokenizer: str
    vocab_size: int
    chat: bool
    only_assistant: bool

    @classmethod
    def of(cls, config: Config) -> Source:
        """Of a config whose data are read from a file."""
        data = config.data
        return cls(
            path=files.named(data.path, "data.path"),
            column=data.column_read,
            tokenizer=data.tokenizer,
            vocab_size=config.model.vocab_size,
            chat=data.kind is DataKind.chat,
            only_assistant=data.loss is DataLoss.assistant,
        )


@dataclass(frozen=True, slots=True)
class Packed:
    tokens: np.ndarray
    """int64, shape (sequences, length)."""

    trained: np.ndarray | None
    """bool, same shape: whether predicting this token counts in the loss; None: every token."""

    documents_read: int
    documents_skipped: int
    """Of those read, how many were null or empty."""

    sequences_skipped: int
    """Sequences that were left out because they hold no token to train on."""


def encoder(source: Source) -> tuple[Encode, tokenizer_folder.Loaded]:
    """The function that encodes a document with content, and the tokenizer. It raises ConfigError for documents that it cannot
    encode."""
    loaded = tokenizer_folder.load(source.tokenizer, source.vocab_size)
    template = ChatTemplate(source.tokenizer) if source.chat else None

    def encode(document: Document) -> tuple[list[int], list[bool] | None]:
        trained = None
        with tokenizer_folder.usable(f"{document.place}, cannot be encoded", "correct the tokenizer, or use another"):
            if template:
                ids, trained = template.encode(document, only_assistant=source.only_assistant)
            else:
                text = document.content
                ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids if text else []
        if not template and document.ends and loaded.end is not None:
            ids.append(loaded.end)
        loaded.check(ids, document.place)
        return ids, trained

    return encode, loaded


class _Sequences:
    """Sequences that fill up, those without a token to train on left out."""

    def __init__(self, count: int, length: int, *, all_trained: bool) -> None:
        import numpy as np

        self.tokens = np.empty((count, length), dtype=np.int64)
        self.trained = None if all_trained else np.zeros((count, length), dtype=bool)
        self.complete = self.filled = self.skipped = 0

    @property
    def full(self) -> bool:
        return self.complete == len(self.tokens)

    def add(self, ids: np.ndarray, trained: np.ndarray | None) -> None:
        """Append tokens until they end or all sequences are full."""
        length, at = self.tokens.shape[1], 0
        while at < len(ids) and not self.full:
            taken = min(length - self.filled, len(ids) - at)
            place = self.complete, slice(self.filled, self.filled + taken)
            self.tokens[place] = ids[at : at + taken]
            if self.trained is not None and trained is not None:
                self.trained[place] = trained[at : at + taken]
            at, self.filled = at + taken, self.filled + taken
            if self.filled < length:
                continue
            self.filled = 0
            # The first token of a sequence is predicted from nothing, so it does not count.
            if self.trained is None or self.trained[self.complete, 1:].any():
                self.complete += 1
            else:
                self.skipped += 1


@cache
def pack(source: Source, sequences: int, length: int) -> Packed:
    """The first `sequences` sequences of `length` tokens of a file. Raises ConfigError if it cannot be read to there, or has no
    token to train on."""
    import numpy as np

    encode, _ = encoder(source)
    made = _Sequences(sequences, length, all_trained=not source.only_assistant)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    num_read = num_skipped = 0
    for document in documents.read(source.path, source.column, chat=source.chat):
        num_read += document.ends
        num_skipped += document.content is None
        if document.content is None:
            continue
        ids, trained = encode(document)
        kept = np.asarray(ids, dtype=np.int64)
        parts.append((kept, np.ones(len(ids), dtype=bool) if trained is None else np.asarray(trained, dtype=bool)))
        made.add(*parts[-1])
        if made.full:
            break
    if not made.full:
        _read_again(made, np.concatenate([ids for ids, _ in parts] or [np.empty(0, np.int64)]),
                    np.concatenate([trained for _, trained in parts] or [np.empty(0, bool)]), source)  # fmt: skip
    return Packed(made.tokens, made.trained, num_read, num_skipped, made.skipped)


def _read_again(made: _Sequences, ids: np.ndarray, trained: np.ndarray, source: Source) -> None:
    """Fill the sequences that remain with the whole file, again and again."""
    import numpy as np

    if not len(ids):
        raise ConfigError(
            "data.path", f"'{source.path}' gives no tokens; name a file with text that the tokenizer knows"
        )
    turns = -(-made.tokens.shape[1] // len(ids))  # a pass then fills a sequence at least
    ids, trained = np.tile(ids, turns), np.tile(trained, turns)
    while not made.full:
        started, before = made.filled, made.complete
        made.add(ids, trained)
        # Passes that begin at the start of a sequence are all alike.
        if not trained.any() or (started == made.filled == 0 and made.complete == before):
            raise ConfigError(
                "data.loss",
                f"assistant: '{source.path}' gives no sequence of {made.tokens.shape[1]} tokens with one of the assistant's; use "
                "data.loss=all or a longer seq_len",
            )
