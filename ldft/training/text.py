"""Tokenizes text: a local file and a local tokenizer folder give one stream of ids. Imports no torch: the parent uses it for
checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ldft.config import DataConfig
from ldft.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PIECE_BYTES = 1 << 20


def pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends a document), in file order. A .txt is one document, split at line ends to bound memory."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
            if "text" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ConfigError(
                    "data.path", f"{path} has no column text (it has {names}); rename the column to train on to text"
                )
            for batch in file.iter_batches(columns=["text"], batch_size=256):
                yield from ((str(text), True) for text in batch.column(0).to_pylist() if text)
        except pa.ArrowInvalid:
            raise ConfigError("data.path", f"{path} is not a parquet file; name a .txt, .jsonl or .parquet") from None
        return
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".txt":
                while lines := file.readlines(_PIECE_BYTES):
                    yield "".join(lines), False
                yield "", True
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(path, number, line), True
    except UnicodeDecodeError as error:
        raise ConfigError("data.path", f"{path} is not UTF-8 (byte {error.start}); convert it") from None


def _document(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError("data.path", f"{path}, line {number}, is not JSON ({error.msg}); fix that line") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ConfigError(
            "data.path", f'{path}, line {number}, has no "text"; write one object {{"text": "..."}} per line'
        )
    return str(value["text"])


def load_tokenizer(folder: str, vocab_size: int) -> tuple[Tokenizer, int | None]:
    """The tokenizer of a folder, and its end-of-document id if it has one. Raises ConfigError if it does not fit the model."""
    from tokenizers import Tokenizer

    path = Path(folder).expanduser() / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            "data.tokenizer", f"no tokenizer.json in '{folder}'; name the folder of a saved fast tokenizer"
        )
    try:
        # tokenizers raises a bare Exception for anything it cannot parse; check the JSON first, so that bugs are not hidden.
        json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError("data.tokenizer", f"{path} is damaged; save the tokenizer again") from None
    tokenizer = Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > vocab_size:
        raise ConfigError(
            "data.tokenizer",
            f"{folder} has {size} tokens, model.vocab_size is {vocab_size}; use the tokenizer of this model",
        )
    settings = path.with_name("tokenizer_config.json")
    end = json.loads(settings.read_text()).get("eos_token") if settings.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    return tokenizer, tokenizer.token_to_id(end) if end else None


def check(data: DataConfig, vocab_size: int) -> None:
    """Raise ConfigError if the file or the tokenizer cannot be used."""
    path = Path(data.path).expanduser()
    if path.suffix not in _SUFFIXES:
        raise ConfigError("data.path", f"'{data.path}' has an unknown type; name a {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise ConfigError("data.path", f"'{data.path}' is not a file here; name a {', '.join(_SUFFIXES)}")
    if not any(text.strip() for text, _ in pieces(path)):
        raise ConfigError("data.path", f"'{data.path}' contains no text; name a file with text")
    load_tokenizer(data.tokenizer, vocab_size)


@cache
def stream(path: str, tokenizer_folder: str, vocab_size: int, length: int) -> np.ndarray:
    """The first `length` token ids of a file (int64), documents one after the other, each with its end token.

    A shorter file is read repeatedly. Raises ConfigError if it yields no token.
    """
    import numpy as np

    tokenizer, end = load_tokenizer(tokenizer_folder, vocab_size)
    parts, have = [], 0
    for text, ends in pieces(Path(path).expanduser()):
        ids = tokenizer.encode(text, add_special_tokens=False).ids if text else []
        if ends and end is not None:
            ids.append(end)
        parts.append(np.asarray(ids, dtype=np.int64))
        have += len(ids)
        if have >= length:
            break
    if not have:
        raise ConfigError("data.path", f"'{path}' gives no tokens; name a file with text that the tokenizer knows")
    return np.resize(np.concatenate(parts), length)
