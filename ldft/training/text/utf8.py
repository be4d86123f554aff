"""Opens text files as UTF-8, and says of a file that is not where it goes wrong: byte and line of the file."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ldft.errors import ConfigError

_CHUNK_BYTES = 1 << 20
_PIECE_CHARACTERS = 1 << 20
# A line this long is cut, so that a file without line ends needs bounded memory.
_LINE_CHARACTERS = 16 << 20
_UTF_16 = "convert it to UTF-8, e.g. iconv -f UTF-16 -t UTF-8"
_CONTROLS_OF_TEXT = b"\t\n\v\f\r\x1b"
# How files begin that are not text, whatever their name says.
_MAGIC = {
    b"\xff\xfe\0\0": ("UTF-32", "convert it to UTF-8, e.g. iconv -f UTF-32 -t UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32", "convert it to UTF-8, e.g. iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16", _UTF_16),
    b"\xfe\xff": ("UTF-16", _UTF_16),
    b"\x1f\x8b": ("gzip", "decompress it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "decompress it with unzstd"),
    b"BZh": ("bzip2", "decompress it with bunzip2"),
    b"\xfd7zXZ\0": ("xz", "decompress it with unxz"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("parquet", "give it the suffix .parquet"),
}


def head(path: Path) -> bytes:
    """The first bytes of a file. Raises ConfigError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> ConfigError:
    """The error for a file that the system does not let us read."""
    return ConfigError("data.path", f"cannot read {path} ({error.strerror or error}); name a file that you can read")


def other_content(start: bytes) -> str:
    """What lies under a file's name after a download that failed, and the fix; empty if nothing says so. start: its first bytes."""
    low = start.lstrip().lower()
    if low.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer to the file; run git lfs pull"
    if low.startswith((b"<!doctype html", b"<html")):
        return (
            "a web page that a download saved in its place; fetch it again, logged in if the model or data set is gated"
        )
    return ""


def check_is_text(path: Path) -> None:
    """Raise ConfigError if the first bytes show another encoding, or a file that is not text."""
    start = head(path)
    for magic, (what, fix) in _MAGIC.items():
        if start.startswith(magic):
            raise ConfigError("data.path", f"{path} is {what}, not UTF-8 text; {fix}")
    if path.suffix.lower() == ".jsonl" and (other := other_content(start)):
        raise ConfigError("data.path", f"{path} is {other}")
    # ASCII in UTF-16 is valid UTF-8 with a NUL beside each character.
    half = len(start) // 2
    every_other = half in (start[: 2 * half : 2].count(0), start[1 : 2 * half : 2].count(0))
    # Cyrillic and Greek in UTF-16 may be valid UTF-8, too, with a control character beside each other character.
    controls = [at for at, byte in enumerate(start) if byte < 32 and byte not in _CONTROLS_OF_TEXT]
    sides = [sum(at % 2 == side for at in controls) for side in (0, 1)]
    if half >= 2 and any(start) and (every_other or (2 * max(sides) > half and 8 * min(sides) < half)):
        raise ConfigError("data.path", f"{path} is UTF-16 without a byte order mark, not UTF-8 text; {_UTF_16}")
    # Of a .jsonl the JSON decoder says in which line they are.
    if path.suffix.lower() == ".txt" and (0 in start or 8 * len(controls) > len(start)):
        raise ConfigError(
            "data.path",
            f"{path} is no text: {len(controls)} of its first {len(start)} bytes are control characters; name a text file",
        )


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The file as text, without a byte order mark, every line end as a newline. Raises ConfigError if it is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        byte, line = _first_invalid(path)
        raise ConfigError("data.path", f"{path} is not UTF-8 (byte {byte}, line {line}); convert it") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _first_invalid(path: Path) -> tuple[int, int]:
    """Offset in bytes from 0, and line from 1, of the first byte that is not UTF-8. The error that a decoder raises counts from
    its own chunk."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, line = 0, 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                within = error.start - waiting
                return before + within, line + chunk.count(b"\n", 0, max(within, 0))
            if not chunk:
                return before, line  # it was mended meanwhile
            before, line = before + len(chunk), line + chunk.count(b"\n")


def parts(path: Path) -> Iterator[str]:
    """A text file in parts of about a MiB, cut at line ends. Tokens then differ at the cuts only, and memory is bounded."""
    with opened(path) as file:
        lines: list[str] = []
        size = 0
        while line := file.readline(_LINE_CHARACTERS):
            lines.append(line)
            size += len(line)
            if size > _PIECE_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
        if lines:
            yield "".join(lines)
