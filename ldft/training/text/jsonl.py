"""Values of one column of a .jsonl file: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldft.errors import ConfigError
from ldft.training.text import utf8

# Python converts no more digits to an integer.
_MOST_DIGITS = 4300


class _Reader:
    """A JSON decoder that knows which keys the last object that it finished, the outermost, repeats."""

    def __init__(self) -> None:
        self._repeated: set[str] = set()
        self._decoder = json.JSONDecoder(parse_int=_integer, object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        names = [name for name, _ in pairs] if len(made) < len(pairs) else []
        self._repeated = {name for name in names if names.count(name) > 1}
        return made

    def read(self, line: str, place: str) -> tuple[Any, set[str]]:
        """The value of a line, and the keys that occur twice in it. Raises ConfigError if it is no JSON."""
        try:
            value = self._decoder.decode(line)
        except json.JSONDecodeError as error:
            raise ConfigError("data.path", f"{place}, is not JSON ({error.msg}){_hint(line)}; fix that line") from None
        except RecursionError:
            raise ConfigError("data.path", f"{place}, is nested too deeply; fix that line") from None
        return value, self._repeated


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def _hint(line: str) -> str:
    opens = {
        "[": ": one object per line is needed, not one list",
        "{": ": one object per line is needed, not one over several",
    }
    return opens.get(line.strip(), "")


def rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    """(place, values of the columns) of each line that is not blank. The first column must exist; the others may be missing: None.

    Raises ConfigError with the line's number if it is not an object or not valid.
    """
    reader = _Reader()
    with utf8.opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            value, repeated = reader.read(line, place)
            if not isinstance(value, dict):
                raise ConfigError(
                    "data.path", f'{place}, is {kind(value)}; write one object {{"{columns[0]}": ...}} per line'
                )
            if columns[0] not in value:
                names = ", ".join(list(value)[:8]) or "no key"
                fix = "data=chat trains on messages" if "messages" in value else "use data.column=<key> for another key"
                raise ConfigError("data.column", f'{place}, has no "{columns[0]}" (it has {names}); {fix}')
            for name in columns:
                if name in repeated:
                    raise ConfigError("data.path", f'{place}, has "{name}" twice; keep one of them')
            found = [value.get(name) for name in columns]
            if "\\u" in line:
                _check_surrogates(found, place)
            yield place, found


def _check_surrogates(values: list[Any], place: str) -> None:
    """Raise ConfigError if a string holds half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(error.object[error.start]):04x}"
        raise ConfigError(
            "data.path", f"{place}, holds {found}, half of a surrogate pair and no character; fix that line"
        ) from None


def kind(value: Any) -> str:
    """What a value is, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    named = {str: "a string", bytes: "bytes", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return named.get(type(value), f"of type {type(value).__name__}")
