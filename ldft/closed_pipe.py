"""What a command does with output that cannot be written: no traceback. If the reader has gone, as with `python -m ldft | head`,
its exit code is the one that shells show for it; a full disk or a lost terminal is one line."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TextIO

EXIT_CODE = 141  # 128 + SIGPIPE

_Arguments = ParamSpec("_Arguments")
_Main = Callable[_Arguments, int]


def _to_nowhere(stream: TextIO) -> None:
    """Send what is left in the stream's buffer, and what comes, to /dev/null: the interpreter flushes it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _UnwritableError(BaseException):
    """Ends a command whose only purpose was to write. No command may take it for an error of its own."""


class _Stream:
    """A stream that takes text, also if nobody gets it."""

    def __init__(self, stream: TextIO | None, *, ends: bool) -> None:
        """stream: None if it was closed before Python started. ends: raise _UnwritableError when the text is lost."""
        self._stream = stream or Path(os.devnull).open("w")  # noqa: SIM115, as long as the process
        self._ends = ends
        self.lost: OSError | None = None
        """Why text was lost."""
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(
                errors="backslashreplace"
            )  # what ASCII lacks, and names of files that are not UTF-8

    def _lose(self, error: OSError) -> None:
        self.lost = error
        _to_nowhere(self._stream)
        if self._ends:
            raise _UnwritableError

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _guarded(main: _Main[_Arguments], *, ends: bool) -> _Main[_Arguments]:
    @functools.wraps(main)
    def run(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> int:
        before = sys.stdout, sys.stderr
        out, err = streams = _Stream(sys.stdout, ends=ends), _Stream(sys.stderr, ends=False)
        sys.stdout, sys.stderr = streams
        code = 0
        try:
            try:
                code = main(*arguments, **named)
            finally:
                for stream in streams:
                    stream.flush()
        except _UnwritableError:
            pass
        finally:
            sys.stdout, sys.stderr = before
        if any(isinstance(stream.lost, BrokenPipeError) for stream in streams):
            return EXIT_CODE
        if out.lost:
            err.write(
                f"ldft: cannot write to standard output ({out.lost.strerror}); write to another file or terminal\n"
            )
            err.flush()
        return code or int(bool(out.lost))

    return run


def work_on(main: _Main[_Arguments]) -> _Main[_Arguments]:
    """For commands whose files matter more than their output: a run goes on and writes its row, and the exit code says that output
    was lost."""
    return _guarded(main, ends=False)


def stop(main: _Main[_Arguments]) -> _Main[_Arguments]:
    """For commands that only show something: they end as soon as nobody can read it."""
    return _guarded(main, ends=True)
