"""The documents of a file in order, each with its place for messages: texts, or conversations as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldft.errors import ConfigError
from ldft.training.text import jsonl, parquet, utf8

SUFFIXES = (".txt", ".jsonl", ".parquet")
CHAT_SUFFIXES = (".jsonl", ".parquet")
_TOOLS = "tools"


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or a part of one."""

    place: str
    """Where it is, for messages: the file with its line or row, from 1."""

    content: Any
    """Its text; with chat, its messages; None where the value is null or empty."""

    tools: list[dict[str, Any]] | None = None
    """The tools that the conversation may call, as JSON schemas."""

    ends: bool = True
    """False for a part of a .txt, which is one document."""


def read(path: Path, column: str, *, chat: bool) -> Iterator[Document]:
    """The documents of a .txt, .jsonl or .parquet file, read as they are asked for. Raises ConfigError with line or row."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        for text in utf8.parts(path):
            yield Document(str(path), text, ends=False)
        yield Document(str(path), "", ends=True)
        return
    columns = (column, _TOOLS) if chat else (column,)
    rows = parquet.rows(path, columns, chat=chat) if suffix == ".parquet" else jsonl.rows(path, columns)
    for place, values in rows:
        if chat:
            yield Document(place, _messages(values[0], place, column), _tools(values[1], place))
        else:
            yield Document(place, _text(values[0], place, column))


def _text(value: Any, place: str, column: str) -> str | None:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise parquet.not_utf8(place, error) from None
    if value is not None and not isinstance(value, str):
        messages = isinstance(value, list) and value and isinstance(value[0], dict)
        fix = "data=chat trains on conversations" if messages else "write a string, or use data.column=<another>"
        raise ConfigError("data.column", f'{place}, has {jsonl.kind(value)} as "{column}", not text; {fix}')
    return value or None


def _messages(value: Any, place: str, column: str) -> list[dict[str, Any]] | None:
    """The messages without the keys that are null, as transformers drops them. Raises ConfigError unless each has a role and a
    content that are strings; content may be missing beside other keys, such as tool_calls."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        fix = "data=text trains on text" if isinstance(value, str) else "write a list of {role, content}"
        raise ConfigError(
            "data.column", f'{place}, has {jsonl.kind(value)} as "{column}", not a list of messages; {fix}'
        )
    messages = []
    for number, message in enumerate(value, 1):
        which = f"{place}, message {number} of {len(value)},"
        if not isinstance(message, dict):
            raise ConfigError("data.column", f"{which} is {jsonl.kind(message)}; write an object with role and content")
        message = {name: inner for name, inner in message.items() if inner is not None}
        if "role" not in message and {"from", "value"} <= message.keys():
            raise ConfigError("data.column", f"{which} has from and value (ShareGPT); rename them to role and content")
        others = message.keys() - {"role", "content"}
        for name in ("role", "content"):
            if name not in message and (name == "role" or not others):
                raise ConfigError("data.column", f"{which} has no {name}; every message needs role and content")
            if not isinstance(message.get(name, ""), str):
                raise ConfigError(
                    "data.column", f"{which} has {jsonl.kind(message[name])} as {name}, not text; write a string"
                )
        messages.append(message)
    return messages


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Tools as a list of objects, or as the JSON text of one, which keeps parquet from giving every tool the keys of all."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                "data.path", f'{place}, has "{_TOOLS}" that are not JSON ({error.msg}); fix them'
            ) from None
        except RecursionError:
            raise ConfigError("data.path", f'{place}, has "{_TOOLS}" that are nested too deeply; fix them') from None
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ConfigError("data.path", f'{place}, has "{_TOOLS}" that are no list of objects; write JSON schemas')
    return value or None
