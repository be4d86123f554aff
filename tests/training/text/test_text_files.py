"""Text files: encodings and damage are said with the file's own byte and line, and memory is bounded."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest

from ldft.training.text import utf8
from tests.training.text.conftest import contents, refusal


@pytest.mark.parametrize(
    ("data", "where"),
    {
        b"caf\xe9": "byte 3, line 1",
        b"a" * 40_000 + b"\ncaf\xe9": "byte 40004, line 2",
        b"a\n" * 700_000 + b"\xff\n": "byte 1400000, line 700001",
        # A character cut by the end of a chunk, and by the end of the file.
        b"a" * (utf8._CHUNK_BYTES - 1) + b"\xc3\n": f"byte {utf8._CHUNK_BYTES - 1}, line 1",
        b"a" * (utf8._CHUNK_BYTES - 1) + b"\xc3\xa9\n\xe9": f"byte {utf8._CHUNK_BYTES + 2}, line 2",
        b"a\nb\xe2\x82": "byte 3, line 2",
        b"a\xed\xa0\x80": "byte 1, line 1",
    }.items(),
    ids=lambda value: str(value)[:30],
)
def test_bytes_that_are_not_utf8_are_found_in_the_file(data: bytes, where: str, tmp_path: Path, words: Path) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(Exception, match=f"is not UTF-8 \\({where}\\); convert it"):
        list(utf8.parts(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    ("data", "what"),
    {
        "a b c".encode("utf-16"): "is UTF-16, not UTF-8 text; convert it to UTF-8, e.g. iconv -f UTF-16",
        "a b c".encode("utf-16-be"): "is UTF-16 without a byte order mark",
        "a b c".encode("utf-16-le"): "is UTF-16 without a byte order mark",
        "привет мир и так далее".encode("utf-16-le"): "is UTF-16 without a byte order mark",
        "привет мир и так далее".encode("utf-16-be"): "is UTF-16 without a byte order mark",
        "a b c".encode("utf-32"): "is UTF-32, not UTF-8 text",
        gzip.compress(b"a b c", mtime=0): "is gzip, not UTF-8 text; decompress it",
        b"PAR1 and more": "is parquet, not UTF-8 text; give it the suffix .parquet",
        b"\x28\xb5\x2f\xfd\0": "is Zstandard",
        b"": "contains no text",
    }.items(),
    ids=str,
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_what_is_no_utf8_text_is_named(data: bytes, what: str, suffix: str, tmp_path: Path, words: Path) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(data)
    assert what in refusal(tmp_path / f"x.{suffix}", words)


@pytest.mark.parametrize("data", [b"a\0b c d", b"\x01\x02a b \x03\x04 c"])
def test_text_with_nul_or_many_control_characters_is_none(data: bytes, tmp_path: Path, words: Path) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    assert f"of its first {len(data)} bytes are control characters; name a text file" in refusal(
        tmp_path / "x.txt", words
    )
    (tmp_path / "x.txt").write_bytes(b"a\tb\r\n\x1b[1mc\x0c")
    utf8.check_is_text(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("data", "text"),
    {
        b"\xef\xbb\xbfa b": "a b",
        b"a\r\nb\r\n": "a\nb\n",
        b"a\0b": "a\0b",
        b"\0\0\0\0": "\0\0\0\0",
        "\N{BYTE ORDER MARK}a\N{BYTE ORDER MARK}".encode(): "a\N{BYTE ORDER MARK}",
    }.items(),
)
def test_marks_and_line_ends(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    assert "".join(contents(tmp_path / "x.txt")) == text


def test_a_file_that_the_system_refuses_is_one_line(tmp_path: Path, words: Path) -> None:
    (tmp_path / "x.txt").symlink_to("/proc/self/mem")
    (tmp_path / "x.parquet").symlink_to("/proc/self/mem")
    for name in ("x.txt", "x.parquet"):
        assert f"cannot read {tmp_path / name} (Input/output error)" in refusal(tmp_path / name, words)


@pytest.mark.parametrize(
    ("name", "line"),
    {
        "x.jsonl.gz": "is compressed; unpack it to a .txt, .jsonl, .parquet",
        "x.json": "has an unknown type; name a .txt, .jsonl, .parquet",
        "nowhere.txt": "is not a file here",
        "folder": "is a folder; name one .txt",
    }.items(),
)
def test_files_of_other_kinds(name: str, line: str, tmp_path: Path, words: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.json").write_text("[]")
    assert line in refusal(tmp_path / name, words)
    (tmp_path / "X.TXT").write_text("a")
    assert contents(tmp_path / "X.TXT") == ["a", ""]


@pytest.mark.parametrize("end", ["\n", ""], ids=["lines", "one line"])
def test_a_large_file_is_read_in_bounded_memory_and_whole(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utf8, "_LINE_CHARACTERS", 1 << 20)
    line = "0123456789" * 10 + end
    count = (24 << 20) // len(line)
    (tmp_path / "x.txt").write_text(line * count)
    tracemalloc.start()
    sizes = [len(part) for part in utf8.parts(tmp_path / "x.txt")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == len(line) * count and len(sizes) > 10
    assert peak < 12 << 20, f"{peak / 2**20:.0f} MiB"
