"""Files that are never half written, and paths that a user named."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ldft.errors import ConfigError

# There is no such file, which each reader says in its own words.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def writer() -> str:
    """This process, for names in folders that several hosts share: pids alone are not unique there."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which replaces `path` at the end of the block. If the block or the writing fails, `path` stays as it was.

    The temporary file is hidden and ends in .tmp, so no pattern for rows or traces matches it. sync: reach the disk before
    replacing. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{writer()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def named(path: str | Path, key: str) -> Path:
    """The path in a config, with the home folder in place of `~`.

    Raises ConfigError for `key` if there is no such home, or if the system refuses to look there: a name that is too long, a
    folder without permission. pathlib would raise OSError wherever such a path is asked about. A missing file is no error.
    """
    try:
        found = Path(path).expanduser()
        found.stat()
    except RuntimeError:
        raise ConfigError(key, f"'{path}': there is no such home folder; name the folder in full") from None
    except ValueError:
        raise ConfigError(key, f"'{path}' holds a NUL, which no name can; correct it") from None
    except OSError as error:
        if error.errno not in _MISSING:
            raise ConfigError(
                key, f"cannot look at '{path}' ({error.strerror}); name a path that you can read"
            ) from None
    return found
