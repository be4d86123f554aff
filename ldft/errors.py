"""The errors that are printed as one line. Any other exception is a bug: its traceback is saved and "internal error" is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# Names in data files, tokenizers and folders may hold line breaks, or half a surrogate pair, which no file of UTF-8 takes.
_BREAKS_LINES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


_LONGEST_SHOWN = 80


def shown(value: Any) -> str:
    """A value as JSON, cut short, for messages."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


class LdftError(Exception):
    """Base of all errors that a user can cause and fix; its text is one complete line, with line breaks and the like escaped."""

    def __init__(self, text: str) -> None:
        super().__init__(_BREAKS_LINES.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


class ConfigError(LdftError):
    """A config value is wrong, in general or on this machine. The line gives the dotted key, the value, what is allowed, the
    fix."""

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        super().__init__(f"{key}: {problem}")


class CombinationError(ConfigError):
    """Values that are valid alone but not together. Status invalid in a single run; a sweep's grid may contain such cells:
    skipped."""


class InternalError(Exception):
    """A bug in ldft that an attempt hit; its traceback is already in the attempt's log."""

    def __init__(self, log: Path) -> None:
        self.log = log
        super().__init__(f"traceback in {log}")


class ResultsError(LdftError):
    """A row cannot be written or read."""
