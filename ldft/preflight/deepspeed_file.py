"""Reads a DeepSpeed config file as DeepSpeed does: as Hjson, which is JSON with comments and trailing commas.

Stricter than DeepSpeed in two points, because both are mistakes that would go unnoticed: a key may be there only once, and text
without quotes may not contain punctuation (Hjson reads it to the end of the line, including the comma).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hjson
from hjson.decoder import JSONObject, make_scanner, scantfnns

from ldft.errors import ConfigError

_KEY = "offload.deepspeed_file"
# What Python's json writes for numbers that JSON cannot express. deepspeed_keys refuses them with their key.
_NOT_FINITE = re.compile(r"NaN\b|-?Infinity\b")
_LONGEST_NUMBER = 300


def read(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed config file. Raises ConfigError, with the line, if it is missing or damaged or has a key twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start + 1} is not UTF-8"
        raise ConfigError(_KEY, f"cannot read {path} ({reason}); name a DeepSpeed JSON file") from None
    try:
        values = _Decoder().decode(text)
    except hjson.HjsonDecodeError as error:
        message = error.msg.replace("%r", repr(text[error.pos : error.pos + 1]))
        raise _damaged(path, f"line {error.lineno}, column {error.colno}: {message}", "fix that line") from None
    except IndexError:  # hjson looks for the end of a comment or of a text in ''' beyond the file's end
        raise _damaged(path, "a comment or a text in three quotes has no end", "end it") from None
    except RecursionError:
        raise _damaged(path, "its sections are nested too deeply", "write a DeepSpeed config") from None
    if not isinstance(values, dict) or not text.strip():
        raise ConfigError(_KEY, f"{path} is not a JSON object; write a DeepSpeed config as {{...}}")
    return values


def _damaged(path: Path, problem: str, fix: str) -> ConfigError:
    return ConfigError(_KEY, f"{path} is not JSON ({problem}); {fix}")


class _Decoder(hjson.HjsonDecoder):
    def __init__(self) -> None:
        super().__init__(object_pairs_hook=list, parse_int=_whole)
        self.parse_object, self.parse_tfnns = _section, _unquoted
        self.scan_once, self.scan_object_once = make_scanner(self)


def _section(state: tuple[str, int], *further: Any) -> tuple[dict[str, Any], int]:
    """hjson's parser of one section, which would take the last of several values of a key."""
    pairs, end = JSONObject(state, *further)
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        text, begin = state
        raise hjson.HjsonDecodeError(f"the section that begins here has '{twice}' twice", text, max(0, begin - 1))
    return dict(pairs), end


def _unquoted(context: Any, text: str, begin: int) -> tuple[Any, int]:
    """hjson's parser of numbers, true, false, null, and text without quotes."""
    if number := _NOT_FINITE.match(text, begin):
        return float(number[0]), number.end()
    try:
        value, end = scantfnns(context, text, begin)
    except OverflowError:  # 1e999
        raise hjson.HjsonDecodeError("the number is too large", text, begin) from None
    if type(value) is int and re.search("[.eE]", text[begin:end]):
        return float(text[begin:end]), end  # hjson makes 1 of 1.0, and a message would not show what the file has
    if isinstance(value, str) and re.search(r"[],:\"{}[]", value):
        raise hjson.HjsonDecodeError(f"'{value}' is neither a number nor in quotes", text, begin)
    return value, end


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else float("inf")
