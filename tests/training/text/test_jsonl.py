"""JSONL: one value a line, refused with the line's number whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.text.conftest import contents, refusal

GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    {
        '{"text": ["a", "b"]}': 'data.column: F, line 2, has a list as "text", not text',
        '{"text": [{"role": "user", "content": "a"}]}': "not text; data=chat trains on conversations",
        '{"text": {"a": "b"}}': 'has an object as "text", not text',
        '{"text": 5}': 'has a number as "text", not text',
        '{"text": NaN}': 'has a number as "text", not text',
        f'{{"text": {"9" * 5000}}}': 'has a number as "text"',
        '{"text": true}': 'has true as "text", not text',
        '{"n": 1}': 'data.column: F, line 2, has no "text" (it has n); use data.column=<key>',
        '{"messages": []}': 'has no "text" (it has messages); data=chat trains on messages',
        "{": "is not JSON (Expecting property name enclosed in double quotes): one object per line is needed, not one over several",
        "{}": 'has no "text" (it has no key)',
        '"a"': "data.path: F, line 2, is a string; write one object",
        "[1]": "F, line 2, is a list; write one object",
        "5": "F, line 2, is a number; write one object",
        "null": "F, line 2, is null; write one object",
        "NaN": "F, line 2, is a number; write one object",
        '{"text": "a"': "F, line 2, is not JSON (Expecting ',' delimiter); fix that line",
        '{"text": "a\tb"}': "F, line 2, is not JSON (Invalid control character at); fix that line",
        '{"text": "a\0"}': "F, line 2, is not JSON (Invalid control character at); fix that line",
        '{"text": "a"} {"text": "b"}': "is not JSON (Extra data)",
        "[": "is not JSON (Expecting value): one object per line is needed, not one list",
        r'{"text": "a \ud800 b"}': r"F, line 2, holds \ud800, half of a surrogate pair",
        r'{"text": "\uDFFF"}': r"F, line 2, holds \udfff, half of a surrogate pair",
        "[" * 100_000: "F, line 2, is nested too deeply; fix that line",
        '{"text": "a", "n": ' + '{"m": ' * 50_000 + "1" + "}" * 50_001: "F, line 2, is nested too deeply",
        '{"text": "a", "text": "b"}': 'F, line 2, has "text" twice; keep one of them',
        r'{"text": "a", "te\u0078t": "b"}': 'F, line 2, has "text" twice',
        '\N{BYTE ORDER MARK}{"text": "a"}': "F, line 2, is not JSON (Expecting value)",
    }.items(),
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_line_is_refused_with_its_number(line: str, says: str, tmp_path: Path, words: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(GOOD + line + "\n" + GOOD)
    assert says.replace("F", str(path), 1) in refusal(path, words)


@pytest.mark.parametrize(
    ("lines", "texts"),
    {
        b'{"text": "a"}\n\n  \n{"text": "b"}': ["a", "b"],
        b'{"text": "a"}\r\n{"text": "b"}\r\n': ["a", "b"],
        b'\xef\xbb\xbf{"text": "a"}\n': ["a"],
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}": ["a"],
        b'{"text": "a", "n": NaN, "m": -Infinity}': ["a"],
        b'{"text": "a", "n": {"x": 1, "x": 2}}': ["a"],
        rb'{"text": "\ud83d\ude00"}': ["\N{GRINNING FACE}"],
        rb'{"text": "a", "n": "\ud800"}': ["a"],
        '{"text": "a\u2028b"}\n'.encode(): ["a\u2028b"],
        b'{"text": null}\n{"text": ""}\n{"text": "a"}\n': [None, None, "a"],
    }.items(),
    ids=lambda value: str(value)[:30],
)
def test_what_is_valid_is_read(lines: bytes, texts: list[str | None], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines)
    assert contents(tmp_path / "x.jsonl") == texts


def test_another_key_is_read_and_a_line_beyond_the_first_hundred_is_numbered(tmp_path: Path, words: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": 5, "body": "a b"}) + "\n" for _ in range(150)) + '{"body": []}\n')
    with pytest.raises(Exception, match=r"data.column: .*x.jsonl, line 151, has a list as"):
        contents(path, "body")
    assert 'line 1, has no "prose" (it has text, body)' in refusal(path, words, column="prose")


@pytest.mark.parametrize(("key", "shown"), [("a\nb", r"a\nb"), ("\u2028", r"\u2028"), ("\ud800", r"\ud800")])
def test_a_name_that_would_break_the_line_is_escaped(key: str, shown: str, tmp_path: Path, words: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({key: "a"}))
    assert f'has no "text" (it has {shown})' in refusal(tmp_path / "x.jsonl", words)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "is a git-lfs pointer to the file; run git lfs"),
        (b"\n<!DOCTYPE html>\n<html></html>\n", "is a web page that a download saved in its place; fetch it again"),
    ],
    ids=["git-lfs", "html"],
)  # fmt: skip
def test_what_a_failed_download_left_is_named(
    suffix: str, start: bytes, says: str, tmp_path: Path, words: Path
) -> None:
    (tmp_path / f"x{suffix}").write_bytes(start)
    assert f"x{suffix} {says}" in refusal(tmp_path / f"x{suffix}", words)
