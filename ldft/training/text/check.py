"""What the parent checks of data.path and data.tokenizer before a rank starts: the tokenizer folder, the structure of the file, and
its first documents, encoded as a rank would."""

from __future__ import annotations

from dataclasses import replace

from ldft.config import Config
from ldft.errors import ConfigError
from ldft.training.text import documents, utf8
from ldft.training.text.packing import Source, encoder

_DOCUMENTS = 100
# Encoding more would keep the user waiting; a rank encodes all that it needs.
_CHARACTERS = 200_000
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")


def check(config: Config) -> list[str]:
    """Notes on the data. Raises ConfigError if the file or the tokenizer cannot be used."""
    source = Source.of(config)
    _check_file(source, config.data.path)
    encode, loaded = encoder(source)
    characters, any_text, unweighted = 0, False, False
    roles: dict[str, None] = {}
    for number, document in enumerate(documents.read(source.path, source.column, chat=source.chat)):
        if document.content is not None and characters < _CHARACTERS:
            part = document.content[:_CHARACTERS] if isinstance(document.content, str) else document.content
            encode(replace(document, content=part))
            characters += len(str(part))
        if source.chat and document.content:
            roles |= dict.fromkeys(message["role"] for message in document.content)
            unweighted = unweighted or any(message.get("weight") == 0 for message in document.content)
        any_text = any_text or bool(document.content and (source.chat or document.content.strip()))
        if source.only_assistant and "assistant" not in roles:
            continue
        if any_text and (number >= _DOCUMENTS or characters >= _CHARACTERS):
            break
    if not any_text:
        what = "conversation" if source.chat else "text"
        raise ConfigError("data.path", f"'{config.data.path}' contains no {what}; name a file with some")
    if source.only_assistant and "assistant" not in roles:
        raise ConfigError(
            "data.loss",
            f"assistant: '{config.data.path}' has no turn of it, only the roles {', '.join(map(repr, list(roles)[:8]))}; rename "
            "the one that is to be trained to assistant, or use data.loss=all",
        )
    if unweighted and not source.only_assistant:
        return [
            "data.loss=all: messages of weight 0 are trained like all others; data.loss=assistant follows their weight"
        ]
    if loaded.end is None and not source.chat:
        return [
            f"data.tokenizer: no eos_token in the files of {source.tokenizer}: documents follow each other without a token "
            "between them"
        ]
    return []


def _check_file(source: Source, named: str) -> None:
    path, suffixes = source.path, documents.CHAT_SUFFIXES if source.chat else documents.SUFFIXES
    allowed = ", ".join(suffixes)
    if path.is_dir():
        raise ConfigError("data.path", f"'{named}' is a folder; name one {allowed}")
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise ConfigError("data.path", f"'{named}' is compressed; unpack it to a {allowed}")
    if suffix not in suffixes:
        why = "holds no conversations" if suffix in documents.SUFFIXES else "has an unknown type"
        raise ConfigError("data.path", f"'{named}' {why}; name a {allowed}")
    if not path.is_file():
        raise ConfigError("data.path", f"'{named}' is not a file here; name a {allowed}")
    if suffix != ".parquet":
        utf8.check_is_text(path)
