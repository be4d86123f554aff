"""The errors that become one line on screen. Anything else is a bug: it keeps its traceback and says "internal error"."""

from __future__ import annotations

from pathlib import Path


class LdftError(Exception):
    """Base of every error that a user can cause and mend; its text is one complete line."""


class ConfigError(LdftError):
    """A config value is wrong, here or on this machine. The line names the dotted key, the value, what is allowed, the fix."""

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        super().__init__(f"{key}: {problem}")


class InternalError(Exception):
    """A bug of ours, met within an attempt; its traceback is in the attempt's log already."""

    def __init__(self, log: Path) -> None:
        self.log = log
        super().__init__(f"traceback in {log}")


class ResultsError(LdftError):
    """A row cannot be written or read."""
