"""The errors that are printed as one line. Any other exception is a bug: its traceback is saved and "internal error" is printed."""

from __future__ import annotations

from pathlib import Path


class LdftError(Exception):
    """Base of all errors that a user can cause and fix; its text is one complete line."""


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
