"""What a command does when the reader of its output has gone, as with `python -m ldft | head`: no traceback, and the exit code that
shells show for it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TextIO

EXIT_CODE = 141  # 128 + SIGPIPE

_Arguments = ParamSpec("_Arguments")
_Main = Callable[_Arguments, int]


def _to_nowhere(stream: TextIO) -> None:
    """Send what is left in the stream's buffer, and what comes, to /dev/null: the interpreter flushes it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Outliving:
    """A stream that takes text without a reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.reader_has_gone = False

    def _lose(self) -> None:
        self.reader_has_gone = True
        _to_nowhere(self._stream)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._lose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def work_on(main: _Main[_Arguments]) -> _Main[_Arguments]:
    """For commands whose files matter more than their output: a run goes on and writes its row. Then EXIT_CODE."""

    @functools.wraps(main)
    def run(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> int:
        before = sys.stdout, sys.stderr
        streams = [_Outliving(stream) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            code = main(*arguments, **named)
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before
        return EXIT_CODE if any(stream.reader_has_gone for stream in streams) else code

    return run


def stop(main: _Main[_Arguments]) -> _Main[_Arguments]:
    """For commands that only show something: they end with EXIT_CODE as soon as nobody reads."""

    @functools.wraps(main)
    def run(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> int:
        try:
            try:
                return main(*arguments, **named)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            _to_nowhere(sys.stdout)
            return EXIT_CODE

    return run
